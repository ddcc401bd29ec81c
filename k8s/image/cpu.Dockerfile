# syntax=docker/dockerfile:1.7
# Controller, Ray's head and nodes without GPUs. From the repository's root:
#
#   docker build -f k8s/image/cpu.Dockerfile -t tuneyard:0.1.0 .
#
# PyPI's torch for Linux carries CUDA. For a build without it, give pip a configuration that finds one:
# --secret id=pip,src=pip.conf
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/tuneyard/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++=4:12.2.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
# torch goes first: DeepSpeed's own set-up imports it.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/tuneyard \
    && pip install -c constraints.txt pip setuptools wheel hatchling ninja packaging py-cpuinfo numpy torch
# Compiled into the installation: compiled on first use, they would cost the first job minutes, and take a compiler.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_BUILD_CPU_ADAM=1 \
    pip install -c constraints.txt --no-build-isolation --no-deps deepspeed
COPY pyproject.toml README.md LICENSE ./
COPY launch ./launch
COPY orchestrator ./orchestrator
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install -c constraints.txt --no-build-isolation '.[postgres,s3,k8s,tensorboard]'
# The kernels of `train.precision: int8`, into the installation and not into this folder's copy of it.
WORKDIR /
RUN python -m launch.native

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 1000 tuneyard \
    && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/tuneyard --shell /bin/bash tuneyard
COPY --from=build /opt/tuneyard /opt/tuneyard
ENV PATH=/opt/tuneyard/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/tuneyard
USER 1000:1000
ENTRYPOINT ["tuneyard"]
CMD ["--help"]
