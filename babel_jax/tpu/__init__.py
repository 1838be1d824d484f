"""Ahead-of-time plans for TPU pods: the programs of a run compiled without a pod, their memory, work and
communication, and bounds on their time.
"""
