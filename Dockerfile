# Without a GPU:  docker build -t fastbyol . && docker run --rm fastbyol demo
# With GPUs:      docker build -t fastbyol --build-arg TORCH=cuda . && docker run --rm --gpus all fastbyol doctor
# PyTorch's wheels bring CUDA: no image of NVIDIA's is needed.
FROM python:3.12-slim
ARG TORCH=cpu
WORKDIR /src
# Triton compiles the launchers of its kernels, on a GPU alone.
RUN [ "$TORCH" = cpu ] || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
COPY . .
RUN pip install --no-cache-dir uv && \
    { [ "$TORCH" = cuda ] || uv pip install --system --no-cache --no-deps --torch-backend cpu --constraint constraints.txt torch torchvision; } && \
    uv pip install --system --no-cache --constraint constraints.txt '.[report]'
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["fastbyol"]
CMD ["--help"]
