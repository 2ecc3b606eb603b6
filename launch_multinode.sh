#!/usr/bin/env bash
# Prints one torchrun command for each node, checks the nodes, or starts them. ./launch_multinode.sh --help
# Written for bash 3.2 and the tools that Linux and macOS have in common.
set -uo pipefail

# torchrun starts its ranks by way of this (PYTHON_EXEC below), so that each leaves a note of its process id.
if [ -n "${RANK_NOTES-}" ] && [ -n "${LOCAL_RANK-}" ]; then
    echo $$ >"$RANK_NOTES/$LOCAL_RANK" && exec python3 "$@"
    exit
fi

usage() {
    cat <<'EOF'
usage: ./launch_multinode.sh [--check | --run | --local N] [OPTIONS] [-- TRAINING FLAGS]

Trains on several machines ("nodes") at once: every node runs torchrun, which starts that node's ranks.

  (by default)              print, for each node, the commands to type there, and what has to be in place
  --check                   look at every node over SSH: is it ready? A table, and how to fix what is not
  --run                     start all nodes over SSH; when one fails, or on Ctrl-C, all of them stop
  --local N                 N "nodes" on this machine, on its CPU: a rehearsal that needs nothing

  --hosts A,B,…             the nodes, as SSH knows them (also USER@HOST); all meet at the first one
  --step 04|05              which step to train (04)
  --nproc-per-node N        ranks on each node (2); gpu: one for each of its GPUs
  --port N                  a free port on the first node (29500; with --local, one that is free)
  --master-addr ADDRESS     the first node as the others reach it (its name in --hosts)
  --elastic MIN:MAX         nodes may leave and join: c10d rendezvous, see 04_multinode/README.md
  --max-restarts N          how often the ranks may be restarted (0; 3 with --elastic)
  --rdzv-id ID              with --elastic: a name for this run, the same on all nodes (the time)
  --rdzv-conf K=V,…         with --elastic: more settings of the rendezvous
  --interface NAME          the network interface between the nodes (found on each node)
  --threads N               CPU threads of a rank (1); without GPUs: the node's cores / its ranks
  --dir DIR                 this folder's path on the nodes (the same as here)
  --setup COMMAND           run first on each node (source .venv/bin/activate, if there is one)
  --ssh COMMAND             how to reach a node (ssh -o BatchMode=yes -o ConnectTimeout=5)
  --interface-to HOST       print the interface that leads to HOST, and exit
  --help                    print this

examples:
  ./launch_multinode.sh --local 2 -- --num-samples 10240 --epochs 1
  ./launch_multinode.sh --hosts alpha,beta --nproc-per-node 8 -- --epochs 5 --accumulate 4
  ./launch_multinode.sh --check --hosts alpha,beta && ./launch_multinode.sh --run --hosts alpha,beta
EOF
}

fail() {
    echo "error: $*" >&2
    exit 2
}

whole_number() { # FLAG VALUE LOWEST
    [[ $2 =~ ^[1-9][0-9]{0,8}$|^0$ && $2 -ge $3 ]] || fail "$1 must be a whole number, $3 or more, not '$2'"
}

# The interface by which packets leave for a host: the one that gloo and NCCL have to use.
# Linux only: there is no command for it that other systems have, too.
interface_to() {
    local address
    command -v ip >/dev/null || fail "no 'ip' command here (package iproute2): give --interface NAME"
    address=$(getent ahostsv4 "$1" | awk '{print $1; exit}')
    [ -n "$address" ] || fail "cannot resolve '$1' on $(hostname): add it to /etc/hosts"
    ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}

mode=print hosts="" step=04 nproc=2 port="" master="" elastic="" restarts="" rdzv_id="" rdzv_conf=""
interface="" threads=1 nodes_here=0 example=""
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
dir=$here
setup="" ssh="ssh -o BatchMode=yes -o ConnectTimeout=5"
if [ -f "$here/.venv/bin/activate" ]; then setup="source .venv/bin/activate"; fi

while (($#)); do
    case $1 in
    --) shift && break ;;
    --help | -h) usage && exit 0 ;;
    --check | --run)
        [ "$mode" = print ] || fail "$1 and --$mode cannot be used together"
        mode=${1#--} && shift && continue
        ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    (($# >= 2)) || case $1 in --*) fail "$1 needs a value, or is unknown (--help lists the options)" ;; esac
    case $1 in
    --local)
        [ "$mode" = print ] || fail "$1 and --$mode cannot be used together"
        whole_number "$1" "$2" 1
        mode=local nodes_here=$2
        ;;
    --hosts) hosts=$2 ;;
    --step) step=$2 ;;
    --nproc-per-node) nproc=$2 ;;
    --port | --master-port) port=$2 ;;
    --master-addr) master=$2 ;;
    --elastic) elastic=$2 ;;
    --max-restarts) restarts=$2 ;;
    --rdzv-id) rdzv_id=$2 ;;
    --rdzv-conf) rdzv_conf=$2 ;;
    --interface) interface=$2 ;;
    --threads) threads=$2 ;;
    --dir) dir=$2 ;;
    --setup) setup=$2 ;;
    --ssh) ssh=$2 ;;
    --interface-to) interface_to "$2" && exit 0 ;;
    *) fail "unknown option '$1' (--help lists the options; training flags come after --)" ;;
    esac
    shift 2
done

# --- what was asked for, made sure of

[ "$nproc" = gpu ] || whole_number --nproc-per-node "$nproc" 1
whole_number --threads "$threads" 1
[[ $step =~ ^0[45]$ ]] || fail "--step is 04 or 05, not '$step'"
script=$(cd "$here" && ls "${step}"_*/train.py 2>/dev/null) || fail "there is no step $step in $here"
[[ $interface =~ ^[A-Za-z0-9._-]*$ ]] || fail "--interface takes one name, such as eth0, not '$interface'"

if [ "$mode" = local ]; then
    [ -z "$hosts$master$interface" ] || fail "--local runs here: leave out --hosts, --master-addr and --interface"
    # Other nodes would have GPUs of their own; these share one machine's.
    set -- --use-gpu 0 "$@"
    master=127.0.0.1
    for ((k = 0; k < nodes_here; k++)); do hosts+=$master,; done
    # One that is free, below those that the system gives to outgoing connections: nothing takes it meanwhile.
    while [ -z "$port" ] || (exec 6<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
elif [ -z "$hosts" ]; then
    [ "$mode" = print ] || fail "--$mode needs the nodes: --hosts A,B,…"
    example=yes hosts=node1,node2
fi
port=${port:-29500}
whole_number --port "$port" 1
((port < 65536)) || fail "--port must be below 65536, not $port"

IFS=, read -r -a logins <<<"$hosts"
count=${#logins[@]} names=()
for login in "${logins[@]}"; do
    [[ $login =~ ^([A-Za-z0-9._][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || fail "'$login' in --hosts is not a host name"
    name=${login#*@}
    if [ "$mode" != local ]; then
        [[ " ${names[*]-} " != *" $name "* ]] || fail "--hosts names $name twice"
        ((count == 1)) || case $name in
        localhost* | 127.*) fail "'$name' means a different machine on each node: --hosts takes names that all nodes know" ;;
        esac
    fi
    names+=("$name")
done
master=${master:-${names[0]}}
[[ $master =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || fail "'$master' in --master-addr is not a host name or address"
[ "$mode" = local ] || ((count == 1)) || case $master in
localhost* | 127.*) fail "--master-addr $master leads every node to itself: give the first node's address" ;;
esac

if [ -n "$elastic" ]; then
    [[ $elastic =~ ^([1-9][0-9]{0,4}):([1-9][0-9]{0,4})$ ]] || fail "--elastic is MIN:MAX, such as 1:4, not '$elastic'"
    ((BASH_REMATCH[1] <= count && count <= BASH_REMATCH[2])) || fail "--elastic $elastic, but --hosts names $count"
    rdzv_id=${rdzv_id:-ddp-$(date +%s)}
    [[ $rdzv_id =~ ^[A-Za-z0-9._-]+$ ]] || fail "--rdzv-id is a word of letters, digits and -, not '$rdzv_id'"
    [[ $rdzv_conf =~ ^([a-z_]+=[0-9]+(,[a-z_]+=[0-9]+)*)?$ ]] || fail "--rdzv-conf is K=V,… not '$rdzv_conf'"
    restarts=${restarts:-3}
    whole_number --max-restarts "$restarts" 0
elif [ -n "$restarts$rdzv_id$rdzv_conf" ]; then
    # A static rendezvous meets at one port, which the ranks that died may still hold.
    fail "--max-restarts, --rdzv-id and --rdzv-conf need --elastic MIN:MAX (N:N for a fixed number of nodes)"
fi

# --- one node's commands

node_commands() { # NODE_RANK
    local k=$1 peer=$master words
    ((k > 0)) || peer=${names[1]-$master}
    printf 'cd %q' "$dir"
    [ -z "$setup" ] || printf ' && %s' "$setup"
    printf ' &&\n'
    if [ "$mode" != local ] && ((count > 1)); then
        # NCCL reads a name as a prefix, eth1 for eth10 too, unless another "=" is in front of it.
        if [ -z "$interface" ]; then
            # shellcheck disable=SC2016 # expanded on the node
            printf 'interface=$(./launch_multinode.sh --interface-to %s) &&\n' "$peer"
            # shellcheck disable=SC2016
            printf 'GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME==$interface '
        else
            printf 'GLOO_SOCKET_IFNAME=%s NCCL_SOCKET_IFNAME==%s ' "$interface" "$interface"
        fi
    fi
    printf 'OMP_NUM_THREADS=%s ' "$threads"
    if [ -n "$elastic" ]; then
        # Restarted ranks meet in a store of their own; in torchrun's they would find the addresses of the dead.
        printf 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 '
        words="--nnodes=$elastic --nproc-per-node=$nproc --max-restarts=$restarts --rdzv-backend=c10d"
        words+=" --rdzv-id=$rdzv_id --rdzv-endpoint=$master:$port"
        words+=" --rdzv-conf=is_host=$((k == 0))${rdzv_conf:+,$rdzv_conf}"
        ((k > 0)) && words+=" --local-addr=${names[k]}" || words+=" --local-addr=$master"
    else
        words="--nnodes=$count --nproc-per-node=$nproc --node-rank=$k --master-addr=$master --master-port=$port"
    fi
    printf '\\\ntorchrun %s \\\n    %s' "$words" "$script"
    (($# == 1)) || printf ' %q' "${@:2}"
    printf '\n'
}

# --- print

if [ "$mode" = print ]; then
    [ -z "$example" ] || echo "# For two nodes called node1 and node2. Name yours: ./launch_multinode.sh --hosts A,B"
    for ((k = 0; k < count; k++)); do
        printf '\n# --- on %s\n' "${names[k]}"
        node_commands $k "$@"
    done
    disk="one disk for all nodes, or one for each: both work"
    [ "$step" = 04 ] || disk="on one disk that all nodes have in common"
    cat <<EOF

# --- before you start (to check this: ./launch_multinode.sh --check --hosts $hosts)
# [ ] $master accepts connections on port $port, and all nodes reach each other on any port: firewalls, VPNs
# [ ] the same commit of this folder in $dir on every node
# [ ] the same Python and the same torch on every node
# [ ] MNIST in the --data-dir of every node, or internet access to download it
# [ ] room for snapshots in --snapshot-dir; $disk
# [ ] SSH to every node without a password, for --check and --run
EOF
    exit 0
fi

# --- reaching the nodes

read -r -a ssh_words <<<"$ssh"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/launch.XXXXXX") || exit 2
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/alive" "$scratch/ended" || exit 2

# Runs a script on a node, or here. Its standard input ends when this launcher stops, or dies.
on_node() { # NODE_RANK SCRIPT
    if [ "$mode" = local ]; then
        bash -c "$2"
    else
        # In base64, so that no shell on the way has anything to interpret.
        # Linux only in one word: before macOS 13, -d is -D.
        "${ssh_words[@]}" -- "${logins[$1]}" "bash -c \"\$(echo $(base64 <<<"$2" | tr -d '\n') | base64 -d)\""
    fi
}

# --- check

# What a node says of itself, a word and its value on each line.
probe() { # NODE_RANK
    local k=$1 peer=$master
    ((k > 0)) || peer=${names[1]-$master}
    cat <<EOF
echo ssh ok
cd $(printf %q "$dir") || exit
echo folder there
{ ${setup:-:}; } >/dev/null
echo python \$(python3 -c 'import platform; print(platform.python_version())')
echo torch \$(python3 -c 'import importlib.metadata as m; print(m.version("torch"))')
command -v torchrun >/dev/null && echo torchrun there
echo commit \$(git describe --always --dirty --exclude='*' || echo no-git)
echo files \$(cat 0*/train.py common/*.py | cksum)
if [ -z "$interface" ]; then echo interface \$(./launch_multinode.sh --interface-to $peer)
elif python3 -c 'import socket; socket.if_nametoindex("$interface")'; then echo interface $interface
fi
if [ -n "$synthetic" ]; then echo data synthetic
elif [ \$(ls $(printf %q "$data_dir")/MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte | wc -l) = 4 ]; then echo data mnist
fi
if [ $k = 0 ]; then :
elif python3 -c 'import socket; socket.create_connection(("$master", $port), 5)'; then echo port open
fi
EOF
}

# Takes the place of rank 0 at the port, for the other nodes to find.
listener="cd $(printf %q "$dir")
{ ${setup:-:}; } >/dev/null
exec python3 -c 'import socket, sys
server = socket.create_server((\"\", $port))
print(\"listening\", flush=True)
sys.stdin.read()'"

said() { # NODE_RANK WORD
    sed -n "s/^$2 //p" "$scratch/node.$1"
}

cell() { # NODE_RANK VALUE WIDTH GOOD FIX: one cell of the table; what is not good is marked, with a fix for below
    local value=${2:-none} mark=" "
    if [ "$4" != yes ]; then
        mark="!"
        fixes+=("${names[$1]}: $5")
    fi
    printf "$mark%-$3s" "$value"
}

same() { # NODE_RANK WORD
    [ -n "$(said "$1" "$2")" ] && [ "$(said "$1" "$2")" = "$(said 0 "$2")" ] && echo yes
}

check() {
    local k data_dir=data synthetic="" fixes=() first=${names[0]}
    local flags=("$@")
    for ((k = 0; k < ${#flags[@]}; k++)); do
        case ${flags[k]} in
        --data[-_]dir=*) data_dir=${flags[k]#*=} ;;
        --data[-_]dir) data_dir=${flags[k + 1]-} ;;
        --num[-_]samples*) synthetic=yes ;;
        esac
    done
    exec 3<>"$scratch/alive"
    on_node 0 "$listener" <"$scratch/alive" >"$scratch/listener" 2>&1 3>&- &
    until [ -s "$scratch/listener" ] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
    for ((k = 0; k < count; k++)); do
        on_node $k "$(probe $k)" </dev/null >"$scratch/node.$k" 2>"$scratch/errors.$k"
    done
    exec 3>&-
    wait
    grep -qx listening "$scratch/listener" && echo port free >>"$scratch/node.0"
    printf ' %-16s %-5s %-9s %-15s %-18s %-7s %-10s %s\n' node ssh python torch commit "$port" interface data
    for ((k = 0; k < count; k++)); do
        cell $k "${names[k]}" 16 yes
        if [ "$(said $k ssh)" != ok ]; then
            cell $k no 5 "" "SSH: $(tail -n 1 "$scratch/errors.$k" | tr -d "\r"). Try: $ssh ${logins[k]} true; to set up a key: ssh-copy-id ${logins[k]}"
        elif [ "$(said $k folder)" != there ]; then
            cell $k ok 5 "" "there is no $dir: git clone the project there, or say where it is with --dir"
        else
            cell $k ok 5 yes
            cell $k "$(said $k python)" 9 "$(same $k python)" "Python is $(said $k python), $first has $(said 0 python): make .venv with the same one"
            if [ "$(said $k torchrun)" != there ]; then
                cell $k none 15 "" "no torchrun: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, or --setup COMMAND"
            else
                cell $k "$(said $k torch)" 15 "$(same $k torch)" "torch is $(said $k torch), $first has $(said 0 torch): pip install torch==$(said 0 torch | cut -d+ -f1) torchvision"
            fi
            local good=yes
            [ "$(same $k commit)$(same $k files)" = yesyes ] || good=""
            cell $k "$(said $k commit)" 18 "$good" "its code is not $first's ($(said 0 commit)): git pull, or copy the folder again"
            if ((k == 0)); then
                good="port $port is in use there: stop what is listening (ss -tlnp), or choose another --port"
            else
                good="cannot connect to $master:$port: open it (and all ports between the nodes) in the firewall, or give --master-addr"
            fi
            cell $k "$(said $k port)" 7 "$([ -n "$(said $k port)" ] && echo yes)" "$good"
            case $(said $k interface) in
            "") cell $k none 10 "" "$(grep -m 1 ^error: "$scratch/errors.$k" || echo "no interface $interface"); see --interface" ;;
            lo) cell $k lo 10 "" "the other node's name resolves to this node itself: fix /etc/hosts" ;;
            *) cell $k "$(said $k interface)" 10 yes ;;
            esac
            cell $k "$(said $k data)" 5 "$([ -n "$(said $k data)" ] && echo yes)" "no MNIST in $data_dir: copy it there, or let the first run download it (if this node has internet)"
        fi
        printf '\n'
    done
    ((${#fixes[@]})) || { echo "All nodes are ready." && return 0; }
    printf '\n'
    printf '! %s\n' "${fixes[@]}"
    return 1
}

if [ "$mode" = check ]; then
    check "$@"
    exit
fi

# --- start

# torchrun gets SIGTERM when standard input ends: it passes it on to its ranks, which save and exit, and
# kills those that have not after 30 seconds. What is left in the end, or after a minute, is killed here:
# a torchrun that hangs, or ranks whose torchrun was killed. Nothing but their notes leads to those: a rank
# has a process group of its own, and loses its parent.
watched() { # SCRIPT
    cat <<EOF
notes=\$(mktemp -d "\${TMPDIR:-/tmp}/ranks.XXXXXX") || exit
kill_the_rest() { for group in \$node \$(cat "\$notes"/*); do kill -KILL -- -\$group; done; }
set -m
exec 5<&0
( trap : TERM
export PYTHON_EXEC=./launch_multinode.sh RANK_NOTES=\$notes
$1
) </dev/null & node=\$!
{ read -r _ <&5
  kill -TERM -- -\$node
  sleep 60
  kill_the_rest
} 2>/dev/null & watch=\$!
set +m
wait \$node
status=\$?
exec 2>/dev/null # bash 3.2 tells that the watch was terminated
kill -- -\$watch
kill_the_rest
rm -rf "\$notes"
exit \$status
EOF
}

set -m # background jobs get process groups of their own: Ctrl-C reaches this script alone
exec 3<>"$scratch/alive" 4<>"$scratch/ended"
for ((k = 0; k < count; k++)); do
    label=${names[k]}
    [ "$mode" = run ] || label="node $k"
    {
        on_node $k "$(watched "$(node_commands $k "$@")")" <"$scratch/alive" 2>&1 |
            while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$label" "$line"; done
        echo "$k ${PIPESTATUS[0]}" >&4
    } 3>&- &
done

status=0
stop() { # WHY STATUS
    ((status == 0)) || return 0
    status=$2
    echo "$1: stopping all nodes" >&2
    exec 3>&-
}
trap 'stop interrupted 130' INT
trap 'stop terminated 143' TERM HUP
for ((left = count; left > 0; )); do
    read -r k ended <&4 || continue # interrupted by a signal
    left=$((left - 1))
    label=${names[k]}
    [ "$mode" = run ] || label="node $k"
    ((ended == 0)) || stop "$label failed with status $ended" "$ended"
done
exit "$status"
