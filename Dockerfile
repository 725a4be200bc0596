# The environment that scvi-init.sh makes, with census-scvi as its command:
#   docker build -t census-scvi .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" census-scvi prepare --config my-config.yaml
FROM python:3.11-slim
WORKDIR /opt/census-scvi
COPY . .
RUN PIP_NO_CACHE_DIR=1 ./scvi-init.sh
# The home of any user: libraries write caches there.
ENV PATH=/opt/census-scvi/.venv/bin:$PATH HOME=/tmp
WORKDIR /work
ENTRYPOINT ["census-scvi"]
