# syntax=docker/dockerfile:1.7
# Nodes with NVIDIA GPUs. From the repository's root:
#
#   docker build -f k8s/image/cuda.Dockerfile -t tuneyard:0.1.0-cuda .
#
# The CUDA of the first stage has to be the one that torch was built with, for DeepSpeed's operations; torch's wheel
# brings its own libraries, so that the second stage needs no more than Python and what the driver's container hook adds.
# Its architectures: --build-arg TORCH_CUDA_ARCH_LIST="8.0;9.0".
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
ARG TORCH_CUDA_ARCH_LIST="8.0;8.9;9.0"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tuneyard/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-dev=3.12.* python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/tuneyard \
    && pip install -c constraints.txt pip setuptools wheel hatchling ninja packaging py-cpuinfo numpy torch
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1 \
    pip install -c constraints.txt --no-build-isolation --no-deps deepspeed
COPY pyproject.toml README.md LICENSE ./
COPY launch ./launch
COPY orchestrator ./orchestrator
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install -c constraints.txt --no-build-isolation '.[postgres,s3,k8s,tensorboard,gpu]'

FROM ubuntu:24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3=3.12.* \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/tuneyard /opt/tuneyard
ENV PATH=/opt/tuneyard/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# This distribution's image has a user 1000 already.
WORKDIR /home/ubuntu
USER 1000:1000
ENTRYPOINT ["tuneyard"]
CMD ["--help"]
