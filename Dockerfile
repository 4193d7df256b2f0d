# docker build -t detrellis .                                        on a CPU
# docker build -t detrellis --build-arg TORCH_BACKEND=cu128 .        on NVIDIA GPUs
#
# docker run --rm --gpus all --ipc=host -v "$PWD:/data" detrellis train small --data my_data
#
# --ipc=host gives loader workers the shared memory that they pass images through; without --gpus it trains on the CPU.
FROM python:3.12-slim

# PyTorch compiles kernels for a CPU with it: docs/performance.md.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# Which build of PyTorch: cpu, or CUDA's version as in cu128.
ARG TORCH_BACKEND=cpu
COPY pyproject.toml README.md LICENSE constraints.txt /source/
COPY src /source/src
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" -c /source/constraints.txt \
        "/source[export,lite,tensorboard,viz]" \
    && rm -rf /source

# Not root: what a run writes into a mounted folder belongs to this user, or to the one that --user names.
RUN useradd --create-home --uid 1000 detrellis
ENV HOME=/home/detrellis
USER detrellis
WORKDIR /data
ENTRYPOINT ["detrellis"]
CMD ["--help"]
