# convert-oss, check-parity and the rest on CPUs, in a shell of a user who is not root.
#
#   docker build --tag convert-oss .
#   docker run --rm --interactive --tty --volume "$PWD:/work" convert-oss
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:${PYTHON}-slim-bookworm
# torch first, from the index of its CPU builds: what depends on it would bring several GB of CUDA.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"
COPY --from=wheel /wheel /wheel
COPY scripts/constraints.txt /wheel/
RUN pip install --no-cache-dir --constraint /wheel/constraints.txt "$(echo /wheel/*.whl)[parity,hub]"
RUN for name in convert-oss verify-oss inspect-oss check-parity report-diff; do \
        variable="_$(echo "$name" | tr a-z- A-Z_)_COMPLETE"; \
        env "$variable=bash_source" "$name" >> /etc/bash.bashrc; \
    done
RUN useradd --create-home --uid 1000 convert && mkdir -p /work && chown convert /work
USER convert
WORKDIR /work
CMD ["bash"]
