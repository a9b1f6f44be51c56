# The site's environment. Sourced on every node before training, by slurm/train.sbatch and by submitted jobs alike.
# A failing line ends the job. The submitting shell's environment is passed on anyway; put here what nodes need anew.

# Software.
# module load cuda
# . "$HOME/venvs/shardtune/bin/activate"

# Models and data sets, on a file system that all nodes see.
# export HF_HOME=/shared/huggingface

# Nodes without internet: fail at once instead of retrying.
# export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# export WANDB_MODE=offline

# A C++ compiler's output (NVMe offload of ZeRO) differs between kinds of nodes.
# export TORCH_EXTENSIONS_DIR=${TMPDIR:-/tmp}/torch_extensions-$USER

# Network. Overrides only: the libraries choose well on most sites. Name an interface where the log shows a wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=INFO
