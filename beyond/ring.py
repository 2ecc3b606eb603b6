"""Ring attention: keys and values go from rank to rank, and no rank ever holds those of a whole text.

It is that of Liu et al., 2023 (arxiv.org/abs/2310.01889), in its plainest form. The first ranks have less to
do than the last ones, because most keys come after their positions. And a rank does not compute while it
sends.

S is the number of positions that each rank has: L / ranks.
"""

import torch
import torch.distributed as dist


def ring_attention(query, key, value):
    """Causal attention to the positions of all ranks; all are (B, heads, S, head size)."""
    # bfloat16 would be too coarse to add up what comes from many ranks.
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        output = RingAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype))
    return output.to(query.dtype)


class RingAttention(torch.autograd.Function):
    """Softmax needs the sum of the exponentials of all scores, and here some scores come later.

    So each rank keeps the logarithm of the sum so far, (B, heads, S, 1), and scales its output down when the
    sum grows. In backward, the keys and values go round again, and their gradients go with them.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.zeros_like(query)
        log_sum = torch.full_like(query[..., :1], -torch.inf)
        traveling = torch.stack([key, value])
        for step in range(dist.get_world_size()):
            if step > 0:
                traveling = pass_on(traveling)
            if is_hidden(step):
                continue
            step_key, step_value = traveling
            scores = masked_scores(query, step_key, step)
            new_log_sum = torch.logaddexp(log_sum, scores.logsumexp(dim=-1, keepdim=True))
            output = output * (log_sum - new_log_sum).exp()
            output = output + (scores - new_log_sum).exp() @ step_value
            log_sum = new_log_sum
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, log_sum = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_query = torch.zeros_like(query)
        # Of softmax's gradient, the part that all scores of a query have in common.
        shared = (grad * output).sum(dim=-1, keepdim=True)
        traveling = torch.stack([key, value, torch.zeros_like(key), torch.zeros_like(value)])
        for step in range(dist.get_world_size()):
            if not is_hidden(step):
                step_key, step_value, grad_key, grad_value = traveling
                weights = (masked_scores(query, step_key, step) - log_sum).exp()
                grad_scores = weights * (grad @ step_value.mT - shared)
                grad_query += scale * grad_scores @ step_key
                grad_key += scale * grad_scores.mT @ query
                grad_value += weights.mT @ grad
            traveling = pass_on(traveling)  # after the last step, each rank has its own again
        _, _, grad_key, grad_value = traveling
        return grad_query, grad_key, grad_value


def is_hidden(step):
    """Whether the keys of this step come from a rank whose positions are all after this rank's."""
    return step > dist.get_rank()  # in step 1, a rank has those of the rank before it, and so on


def masked_scores(query, key, step):
    """How well each key fits each query, (B, heads, S, S); -inf where the key comes later than the query."""
    scores = query.shape[-1] ** -0.5 * query @ key.mT
    if step > 0:
        return scores  # keys of an earlier rank
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
    return scores.masked_fill(is_later, -torch.inf)


def pass_on(tensor):
    """Send `tensor` to the next rank, and return what the one before sends. The last one's next is rank 0."""
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    received = torch.empty_like(tensor)
    send = dist.P2POp(dist.isend, tensor, (rank + 1) % world_size)
    receive = dist.P2POp(dist.irecv, received, (rank - 1) % world_size)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return received
