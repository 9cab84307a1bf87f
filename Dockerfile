# CPU by default; `docker build --build-arg TORCH=https://download.pytorch.org/whl/cu128 .` for CUDA.
FROM python:3.11-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=models
WORKDIR /app
RUN pip install --no-cache-dir torch torchvision --index-url ${TORCH}
COPY pyproject.toml README.md LICENSE CITATION.cff CHANGELOG.md ./
COPY src ./src
RUN pip install --no-cache-dir ".[${EXTRAS}]" && useradd --create-home person
USER person
WORKDIR /home/person
ENTRYPOINT ["consilience"]
CMD ["--help"]
