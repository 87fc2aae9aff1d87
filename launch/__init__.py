"""Starts training runs: on this machine, under Slurm, on GKE, on TPU VMs (docs/launch.md)."""
