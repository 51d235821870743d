#!/usr/bin/env bash
# A real Slurm of several nodes on one machine, for tests: Debian's slurm-wlm, run by root, without munge or systemd.
#   tools/local_slurm.sh up DIR [NODES] [GPUS]   start it, then: export SLURM_CONF=DIR/slurm.conf
#   tools/local_slurm.sh crash DIR NODE          kill a node with everything on it, as a power cut does
#   tools/local_slurm.sh boot DIR NODE           start that node again
#   tools/local_slurm.sh down DIR                stop everything
#   tools/local_slurm.sh check                   say what it lacks here, if anything
# Every node is a slurmd in its own host-name, mount and process namespace, with its own 127.0.0.x address.
# The GPUs are plain files: Slurm counts and hands them out, nothing can compute on them.
# Environment: LOCAL_SLURM_OWNER=PID  stop everything once that process is gone, however it ended
#              LOCAL_SLURM_PORT=N     the controller's port, the nodes' behind it (default: a free block)
set -euo pipefail

# The first of some ports that nothing listens on, below those that jobs meet at (launch/node.py).
free_ports() {
    local count=$1 base port
    for _ in $(seq 50); do
        base=$((10000 + RANDOM % 9900))
        for ((port = base; port < base + count; port++)); do
            if (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; then continue 2; fi
        done
        echo "$base"
        return
    done
    echo "local_slurm: no free ports" >&2
    return 1
}

write_config() {
    local dir=$1 nodes=$2 gpus=$3 base=$4 i
    cat >"$dir/slurm.conf" <<CONF
ClusterName=medllm
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.own.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
MessageTimeout=60
KillWait=30
CompleteWait=0
FirstJobId=$((1 + RANDOM % 30000))
MinJobAge=600
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PlugStackConfig=$dir/plugstack.conf
CONF
    for i in $(seq "$nodes"); do
        echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.$((10 + i)) Port=$((base + i))" \
            "CPUs=16 RealMemory=64000 Gres=gpu:$gpus State=UNKNOWN"
    done >>"$dir/slurm.conf"
    echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
    echo "Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
    : >"$dir/plugstack.conf"
    { cat /etc/hosts; for i in $(seq "$nodes"); do echo "127.0.0.$((10 + i)) n$i"; done; } >"$dir/hosts"
}

boot_node() {
    local dir=$1 node=$2
    # shellcheck disable=SC2016 # expanded inside the namespace
    setsid unshare --uts --mount --pid --fork --kill-child=SIGKILL --mount-proc bash -c '
        hostname "$2"; mount --bind "$1/hosts" /etc/hosts; exec slurmd -D -f "$1/slurm.conf" -N "$2"
    ' node "$dir" "$node" </dev/null >"$dir/$node.out" 2>&1 &
    echo $! >"$dir/$node.namespace.pid"
}

check() {
    local lacking=""
    if [[ $(id -u) != 0 ]]; then
        lacking="root"
    elif ! command -v slurmctld slurmd sbatch >/dev/null; then
        lacking="Slurm (apt-get install slurm-wlm)"
    elif ! unshare --uts --mount --pid --fork --mount-proc true 2>/dev/null; then
        lacking="the right to make namespaces (a container without privileges?)"
    fi
    [[ -z $lacking ]] || { echo "$lacking"; return 1; }
}

owner_lives() {
    [[ -z ${LOCAL_SLURM_OWNER:-} ]] || kill -0 "$LOCAL_SLURM_OWNER" 2>/dev/null
}

# Runs beside the cluster and takes it down when its owner is gone: nobody else would, had the owner been killed.
watch_owner() {
    while owner_lives; do sleep 1; done
    down "$1"
}

up() {
    local dir nodes=${2:-2} gpus=${3:-8} base i
    mkdir -p "$1"
    dir=$(realpath "$1")
    base=${LOCAL_SLURM_PORT:-$(free_ports $((nodes + 1)))}
    mkdir -p "$dir/state" "$dir/spool" "$dir/dev"
    for i in $(seq 0 $((gpus - 1))); do : >"$dir/dev/nvidia$i"; done
    write_config "$dir" "$nodes" "$gpus" "$base"
    if [[ -n ${LOCAL_SLURM_OWNER:-} ]]; then
        setsid "$(realpath "$0")" watch "$dir" </dev/null >/dev/null 2>&1 &
        echo $! >"$dir/watch.pid"
    fi
    setsid slurmctld -D -f "$dir/slurm.conf" </dev/null >"$dir/slurmctld.out" 2>&1 &
    echo $! >"$dir/slurmctld.pid"
    for i in $(seq "$nodes"); do boot_node "$dir" "n$i"; done
    export SLURM_CONF=$dir/slurm.conf
    for i in $(seq 240); do
        sleep 0.5 # sinfo would wait a minute for a controller that has refused to start
        if ! owner_lives || ! kill -0 "$(cat "$dir/slurmctld.pid")" 2>/dev/null; then break; fi
        [[ $(sinfo --noheader --format=%T%D 2>/dev/null) == "idle$nodes" ]] && return
    done
    down "$dir"
    tail -n 3 "$dir/slurmctld.out" >&2
    echo "local_slurm: the nodes did not come up; see $dir/*.log" >&2
    exit 1
}

down() {
    local dir pid_file pid
    dir=$(realpath "$1")
    for pid_file in "$dir"/*.namespace.pid "$dir/slurmctld.pid" "$dir/watch.pid"; do
        [[ -s $pid_file ]] || continue
        pid=$(cat "$pid_file")
        [[ $pid == "$$" ]] || kill -KILL "$pid" 2>/dev/null || true
        rm -f "$pid_file"
    done
}

case "${1:-}" in
    up) up "${@:2}" ;;
    down) down "$2" ;;
    crash) kill -KILL "$(cat "$2/$3.namespace.pid")" ;;
    boot) boot_node "$(realpath "$2")" "$3" ;;
    watch) watch_owner "$2" ;;
    check) check ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d >&2; exit 2 ;;
esac
