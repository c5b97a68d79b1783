# The server and the client in one image, without root and without a compiler. The embedded model is in it, and so is
# the native code, for every level of processors of the kind that builds it.
#
#   docker build .                               torch's CPU build, whose index uv knows
#   docker build --build-arg TORCH_BACKEND= .    the package index's own build, which is one for CUDA

ARG PYTHON_IMAGE=python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
FROM ${PYTHON_IMAGE} AS build

# As for `uv pip install --torch-backend`: cpu, cu130, …; empty for what the package index has.
ARG TORCH_BACKEND=cpu

RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
# Exact versions, and files with the digests that are written down there (.ci/make-lock).
COPY deploy/image/*.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --require-hashes --requirement tools.lock
# Dependencies have a layer of their own, which a change of the code keeps. Bytecode is written here, because the
# server's file system is read-only. torch's own index has other builds than the package index, so from there torch is
# taken by its version alone.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/venv \
    && install() { uv pip install --python /opt/venv --link-mode copy --compile-bytecode "$@"; } \
    && locked() { install --no-deps --require-hashes --requirements "$1"; } \
    && if [ -z "$TORCH_BACKEND" ]; then locked requirements.lock; else \
      awk '/^[a-z]/ { is_torch = /^(torch|triton|nvidia-|cuda-)/ } !is_torch' requirements.lock > others.lock \
      && locked others.lock \
      && install --torch-backend "$TORCH_BACKEND" "$(grep -o '^torch==[^ ]*' requirements.lock)"; fi \
    # Of hundreds of model classes none is imported.
    && find /opt/venv/lib/*/site-packages/transformers/models -name __pycache__ -prune -exec rm -r {} + \
    # Its own dependency, llama-cpp-python, would be compiled; only the model file in it is used.
    && locked model.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY proto proto
COPY client client
COPY server server
COPY dash_runtime dash_runtime
# The list of all that is inside (CycloneDX), beside it.
RUN export DASH_WHEEL_MACHINE="$(uname -m)" \
    && pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /wheel . \
    && uv pip install --python /opt/venv --link-mode copy --compile-bytecode --no-deps /wheel/*.whl \
    && cyclonedx-py environment --output-reproducible --output-file /opt/venv/dash-llm.cdx.json /opt/venv/bin/python


FROM ${PYTHON_IMAGE}

RUN useradd --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin dash \
    && install --directory --owner dash --group dash /var/cache/dash
COPY --from=build /opt/venv /opt/venv

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

VOLUME /var/cache/dash
EXPOSE 50051

# A first start with a large model, which it converts and measures, takes minutes on two busy cores.
HEALTHCHECK --start-period=600s --start-interval=4s --interval=15s --timeout=10s --retries=3 \
    CMD ["dash-client", "health", "--target", "127.0.0.1:50051", "--timeout", "5"]

CMD ["dash-server"]
