# shellcheck shell=bash
# What every batch script does, below its `#SBATCH` lines: RUN and STAGE are the script's arguments. `medllm submit`
# freezes this file into RUN/launch beside the site settings.
set -uo pipefail
run=$1 stage=$2 code=0
supervisor=$run/code/megatron_medllm/launch/supervisor.py
# shellcheck source=slurm/env.sh
source "$run/launch/env.sh"
if [[ -s $run/launch/container-options ]]; then # cluster.container_image, in place of the site's
    mapfile -t container <"$run/launch/container-options"
    for option in "${!MEDLLM_SRUN[@]}"; do
        [[ ${MEDLLM_SRUN[option]} != --container-* ]] || unset "MEDLLM_SRUN[option]"
    done
    MEDLLM_SRUN+=("${container[@]}")
fi
export PYTHONPATH=$run/code PYTHONSAFEPATH=1 # the frozen code, not the one in the working directory
trap : TERM # outlive a cancellation until the reason is written down
python3 "$supervisor" begin "$run" "$stage" || exit
srun "${MEDLLM_SRUN[@]}" "$MEDLLM_PYTHON" -m megatron_medllm.launch.node "$run" "$stage" || code=$?
python3 "$supervisor" end "$run" "$stage" "$code"
