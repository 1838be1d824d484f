# An image with babel on its PATH, for one kind of device:
#
#   docker build --build-arg EXTRAS=hf,buckets     -t babel-jax:cpu .
#   docker build --build-arg EXTRAS=hf,buckets,gpu -t babel-jax:gpu .   # run it with --gpus all
#   docker build --build-arg EXTRAS=hf,buckets,tpu -t babel-jax:tpu .   # for tpu_scripts/gke.sh --image
#
# CUDA and libtpu come with their Python packages, so one base serves all. Runs, text and models are mounted at /work.
FROM python:3.11-slim

ARG EXTRAS=hf,buckets
WORKDIR /opt/babel-jax
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY babel_jax ./babel_jax
COPY configs ./configs
RUN pip install --no-cache-dir --constraint constraints.txt editables hatchling setuptools \
    && pip install --no-cache-dir --constraint constraints.txt --no-build-isolation ".[${EXTRAS}]"

# No user of its own: the devices of a TPU host belong to root.
WORKDIR /work
CMD ["babel", "--help"]
