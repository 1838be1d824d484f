"""Ahead-of-time plans for TPU pods: the train step compiled without one, its memory, work and communication,
and bounds on its time.
"""
