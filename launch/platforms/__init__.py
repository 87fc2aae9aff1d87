"""Jobs for clusters: their description (`job`), shell templates (`render`), submission (`submit`).

launch/gke.py, slurm.py and tpu_vm.py are the commands; launch/jobs/ has example jobs.
"""
