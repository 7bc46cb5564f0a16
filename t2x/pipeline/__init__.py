"""Pipeline parallelism: schedules, the layers of stages, and the executor."""
