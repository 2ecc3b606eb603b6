# The image that 04_multinode/kubernetes.yaml names, for CPUs and for NVIDIA GPUs:
#
#     docker build --tag ddp .
#     docker run --rm --shm-size=1g ddp python 01_single_gpu/train.py --num-samples 10240 --epochs 1
#
# (with GPUs: docker run --gpus all …). Our tests hold this file against a linter. Nobody has built the image yet.

# A plain Python: pip brings torch with CUDA libraries of its own, as in `make train`, and the host has the driver.
FROM python:3.11-slim
RUN useradd --uid 1000 --create-home trainer && install --directory --owner=trainer /workspace
WORKDIR /workspace
# For --compile. Any version will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY --chown=1000 . .
USER 1000
