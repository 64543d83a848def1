# An image for GPU nodes. Not built where this project is developed, which has neither Docker's engine nor a GPU.
#   docker build -t digrap-scale .
# torch 2.9's torchrun kills ranks 30 s after SIGTERM, whatever TORCH_ELASTIC_SHUTDOWN_TIMEOUT says; 2.13's obeys it: take an image
# of 2.13 where there is one for your CUDA, or see to it that a save takes less.
# -devel: DeepSpeed compiles its operators at first use, which needs nvcc.
ARG PYTORCH=2.9.1-cuda12.8-cudnn9-devel
FROM pytorch/pytorch:${PYTORCH}
RUN apt-get update && apt-get install -y --no-install-recommends curl git g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/digrap-scale
COPY . .
# The image's own torch stays: it is built for its CUDA.
RUN pip freeze | grep -E '^torch==' > /tmp/torch.txt && pip install --no-cache-dir -c /tmp/torch.txt '.[deepspeed]'
WORKDIR /workspace
ENTRYPOINT ["digrap-scale"]
