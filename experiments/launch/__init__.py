"""Starting a run on several hosts: recipes for Cloud TPU, SLURM and one GPU host, and a pod to rehearse on.

`tpu_pod.sh`, `slurm.sbatch` and `gpu_host.sh` are commands to copy and edit. `local` starts several
processes on this machine, over CPU.
"""
