#!/usr/bin/env bash
# A real Slurm of several nodes on one machine, for tests: Debian's slurm-wlm, run by root, without munge or systemd.
#   tools/local_slurm.sh up DIR [NODES] [GPUS]   start it, then: export SLURM_CONF=DIR/slurm.conf
#   tools/local_slurm.sh crash DIR NODE          kill a node with everything on it, as a power cut does
#   tools/local_slurm.sh boot DIR NODE           start that node again
#   tools/local_slurm.sh down DIR                stop everything
# Every node is a slurmd in its own host-name, mount and process namespace, with its own 127.0.0.x address.
# The GPUs are plain files: Slurm counts and hands them out, nothing can compute on them.
set -euo pipefail

write_config() {
    local dir=$1 nodes=$2 gpus=$3 base=$4 i
    cat >"$dir/slurm.conf" <<CONF
ClusterName=medllm$base
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
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
SlurmdTimeout=6
KillWait=10
CompleteWait=0
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

up() {
    local dir nodes=${2:-2} gpus=${3:-8} base=${LOCAL_SLURM_PORT:-26817} i
    mkdir -p "$1"
    dir=$(realpath "$1")
    mkdir -p "$dir/state" "$dir/spool" "$dir/dev"
    for i in $(seq 0 $((gpus - 1))); do : >"$dir/dev/nvidia$i"; done
    write_config "$dir" "$nodes" "$gpus" "$base"
    slurmctld -f "$dir/slurm.conf"
    for i in $(seq "$nodes"); do boot_node "$dir" "n$i"; done
    export SLURM_CONF=$dir/slurm.conf
    for i in $(seq 60); do
        [[ $(sinfo --noheader --format=%T%D 2>/dev/null) == "idle$nodes" ]] && return
        sleep 0.5
    done
    echo "local_slurm: the nodes did not come up; see $dir/*.log" >&2
    exit 1
}

down() {
    local dir pid_file
    dir=$(realpath "$1")
    for pid_file in "$dir"/*.namespace.pid "$dir/slurmctld.pid"; do
        [[ ! -s $pid_file ]] || kill -KILL "$(cat "$pid_file")" 2>/dev/null || true
        rm -f "$pid_file"
    done
}

case "${1:-}" in
    up) up "${@:2}" ;;
    down) down "$2" ;;
    crash) kill -KILL "$(cat "$2/$3.namespace.pid")" ;;
    boot) boot_node "$(realpath "$2")" "$3" ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d >&2; exit 2 ;;
esac
