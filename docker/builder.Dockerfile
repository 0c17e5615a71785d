# The cache builder, a job that ends. From the repository's root:
#
#     docker build -f docker/builder.Dockerfile -t lrea-builder .
#     docker run --rm -v BUNDLE:/bundle:ro -v DATA:/data:ro -e LREA_STORE_URL=redis://STORE:6379/0 lrea-builder \
#         build --bundle /bundle --data /data
#
# Shards are written to /work, about 20 bytes a row: mount a volume there, and `--resume` finds them after a restart.
#
# TORCH_VARIANT=cuda as for the service.

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

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin lrea
COPY --from=install /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE ./
COPY model/ model/
COPY cache_builder/ cache_builder/
# The root file system is read-only when this runs, so Python can leave no byte code then.
RUN /opt/venv/bin/python -m compileall -q model cache_builder \
    && mkdir /work && chown 10001:10001 /work
VOLUME /work
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LREA_WORK_DIR=/work
USER 10001:10001
ENTRYPOINT ["python", "-m", "cache_builder"]
CMD ["--help"]
