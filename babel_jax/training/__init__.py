"""Training: one mesh, one jitted step, and a run of stages that can be stopped anywhere."""
