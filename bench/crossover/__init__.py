"""The main job: find the length from which the linear form is the faster one."""
