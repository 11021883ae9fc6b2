# hf-attn-patch in a container: docker build --target cpu -t hf-attn-patch:cpu .   (or cuda)
#   docker run hf-attn-patch:cpu                                                    what runs there: hf-attn env
#   docker run --gpus all -v "$PWD:/work" hf-attn-patch:cuda convert SRC DST --kv-heads 8

FROM python:3.11-slim AS cpu
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "hf-attn-patch[train,plot]"
COPY examples /opt/hf-attn-patch/examples
WORKDIR /work
ENTRYPOINT ["hf-attn"]
CMD ["env"]

# torch's own wheel brings CUDA's libraries; the driver is the host's, by NVIDIA's container toolkit. Triton compiles its
# launchers with a C compiler when a kernel is first called.
FROM python:3.11-slim AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "hf-attn-patch[flash,train,plot]"
COPY examples /opt/hf-attn-patch/examples
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["hf-attn"]
CMD ["env"]
