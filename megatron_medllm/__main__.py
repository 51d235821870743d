"""`python -m megatron_medllm` is `medllm`."""

from megatron_medllm.cli import main

if __name__ == "__main__":
    main()
