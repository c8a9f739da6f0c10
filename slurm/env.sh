# shellcheck shell=bash
# The one file with what differs between sites. Every value can be given at submission as well:
#   KLONG_CONTAINER=pyxis KLONG_IMAGE=/images/klong.sqsh sbatch slurm/sft.sbatch CONFIG
# No secrets here: W&B reads WANDB_API_KEY from the environment that you submit from, which Slurm passes on.

# Logs of every attempt, on a file system that all nodes see.
: "${KLONG_LOGS:=$SLURM_SUBMIT_DIR/slurm-logs}"

# How a task finds its software: none (a virtual environment), pyxis (enroot), or apptainer.
: "${KLONG_CONTAINER:=none}"
# With none: the environment that `make install` made, on a file system that all nodes see.
: "${KLONG_VENV:=$KLONG_HOME/.venv}"
# With pyxis an image or a .sqsh file, with apptainer a .sif file; and what is mounted, SOURCE:TARGET,...
: "${KLONG_IMAGE:=}"
# The folders of run.dir and of the data must be among them: what is not mounted is the container's own, and lost.
: "${KLONG_MOUNTS:=$KLONG_HOME:$KLONG_HOME,$KLONG_LOGS:$KLONG_LOGS}"
# How often a job that ended before its time limit is queued again by its script (not by Slurm's own doing).
: "${KLONG_REQUEUES:=50}"
# How often rl.sbatch starts a role again that has died.
: "${KLONG_RESTARTS:=5}"
# Seconds after one role of rl.sbatch has stopped, being told to, until the others are told as well.
: "${KLONG_STOP_SECONDS:=600}"
# Where rl.sbatch's servers listen, and by which name the others reach them (default: their node's). They have routes
# that change a model and ask nobody for a password: on a network that is not trusted, name a private address.
export KLONG_SERVER_HOST="${KLONG_SERVER_HOST:-0.0.0.0}"
export KLONG_SERVER_ADDRESS="${KLONG_SERVER_ADDRESS:-}"
# Most that the clocks of two nodes may differ by, seconds: logs and file times are compared across nodes.
: "${KLONG_CLOCK_SECONDS:=5}"
# Least free space on a node's /tmp, GiB (0: not checked).
: "${KLONG_TMP_GIB:=1}"

# One thread of the CPU's math libraries for each task: ranks share a node's cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Kernels of communication and computation in the order of launch, which Megatron's overlap of tensor- and
# context-parallel communication relies on before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Where a crash was, in Python.
export PYTHONFAULTHANDLER=1
export PYTHONUNBUFFERED=1

# NCCL finds networks by itself. Set these only where it chooses wrongly (NCCL_DEBUG=INFO shows what it chose):
# export NCCL_SOCKET_IFNAME==eth0   # the interface for its set-up; with "=" exactly this name
# export GLOO_SOCKET_IFNAME=eth0    # gloo does not read NCCL's
# export NCCL_IB_HCA==mlx5_0,mlx5_1 # InfiniBand adapters of the compute network, without those for storage
# NVLink SHARP makes all-reduce faster and takes GPU memory; where memory is short:
# export NCCL_NVLS_ENABLE=0
