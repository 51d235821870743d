# shellcheck shell=bash
# Site settings, in one place. Copy it, fill it in, and name the copy in the config (cluster.env_file), or edit it here.
# `medllm submit` freezes it into the run directory; the batch scripts source the frozen copy.

# Who pays, and where (sbatch reads these itself). The recipe's section `cluster` wins where it has such a setting.
# export SBATCH_ACCOUNT=medllm
# export SBATCH_PARTITION=gpu

# Where Python is: a container for pyxis/enroot, or a virtual environment on the shared file system.
MEDLLM_CONTAINER_IMAGE=${MEDLLM_CONTAINER_IMAGE:-}   # e.g. nvcr.io#nvidia/pytorch:25.09-py3 or /images/medllm.sqsh
MEDLLM_CONTAINER_MOUNTS=${MEDLLM_CONTAINER_MOUNTS:-} # e.g. /lustre:/lustre
MEDLLM_PYTHON=${MEDLLM_PYTHON:-python}               # e.g. /lustre/medllm/.venv/bin/python

# Compute nodes are usually offline: everything must be in the caches already.
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}

# Network. Pin the interfaces if your site needs it.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_FR_BUFFER_SIZE=2000                     # the flight recorder: docs/train.md
export CUDA_DEVICE_MAX_CONNECTIONS=1                 # Megatron's tensor-parallel overlap relies on the launch order
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# What every srun gets. One failing task must not kill the ones that are still saving: they have two minutes.
MEDLLM_SRUN=(--kill-on-bad-exit=0 --wait=120)
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || MEDLLM_SRUN+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # not inherited since 22.05
if [[ -n $MEDLLM_CONTAINER_IMAGE ]]; then
    MEDLLM_SRUN+=("--container-image=$MEDLLM_CONTAINER_IMAGE")
    [[ -z $MEDLLM_CONTAINER_MOUNTS ]] || MEDLLM_SRUN+=("--container-mounts=$MEDLLM_CONTAINER_MOUNTS")
fi
