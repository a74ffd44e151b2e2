import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch: tests share the cores with workers
