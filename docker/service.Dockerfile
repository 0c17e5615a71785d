# The scoring service. From the repository's root:
#
#     docker build -f docker/service.Dockerfile -t lrea-service .
#     docker build -f docker/service.Dockerfile -t lrea-service:cuda --build-arg TORCH_VARIANT=cuda .
#
# Bundles are mounted, never baked in: the image knows no model.

FROM python:3.11-slim-bookworm AS install
# cpu: 200 MB of torch from its CPU index; cuda: 3 GB with the CUDA libraries from the default index.
ARG TORCH_VARIANT=cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /install
COPY requirements.lock requirements-cuda.lock ./
# Without dependencies and with hashes: what no lock names, or is not what it was, doesn't get in.
# torch first, in a layer of its own: it is nine tenths of the image and changes least.
RUN sed -n '/^torch==/,/[^\\]$/p' requirements.lock > torch.lock \
    && case "$TORCH_VARIANT" in \
        cpu) pip install --no-deps --require-hashes --index-url "$TORCH_CPU_INDEX" -r torch.lock ;; \
        cuda) pip install --no-deps --require-hashes -r torch.lock -r requirements-cuda.lock ;; \
        *) echo "TORCH_VARIANT is '$TORCH_VARIANT', wanted cpu or cuda" >&2; exit 1 ;; \
    esac
# Only the dependencies: the code is copied beside them, so that a change to it rebuilds none of this.
RUN pip install --no-deps --require-hashes -r requirements.lock && pip check

# The native kernels for every processor that is known, so that the image needs no compiler: a second of work.
FROM python:3.11-slim-bookworm AS kernels
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY model/ model/
RUN python -m model.native.library --out /build/built

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin lrea
COPY --from=install /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE ./
COPY model/ model/
COPY service/ service/
COPY --from=kernels /build/built/ model/native/built/
# The root file system is read-only when this runs, so Python can leave no byte code then.
RUN /opt/venv/bin/python -m compileall -q model service
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LREA_HOST=0.0.0.0 \
    LREA_PORT=8000 \
    LREA_BUNDLES_DIR=/bundles
USER 10001:10001
EXPOSE 8000
# /livez, not /readyz: a service that drains or waits for its store must not be killed for it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", \
         "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['LREA_PORT']}/livez\", timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
