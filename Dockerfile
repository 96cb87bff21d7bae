# The app, as a person without privileges, on a file system that may be read-only: docker run --read-only --tmpfs /tmp -p 7860:7860 IMAGE
FROM python:3.12-slim
ENV OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 \
    GRADIO_TEMP_DIR=/tmp/gradio NUMBA_CACHE_DIR=/tmp/numba HOME=/tmp PORT=7860
WORKDIR /opt/diffusion-lens
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY app.py README.md ./
COPY diffusion_lens diffusion_lens
COPY assets assets
USER 65534:65534
EXPOSE 7860
HEALTHCHECK --start-period=30s CMD python -c "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=5)"
CMD ["sh", "-c", "GRADIO_SERVER_NAME=0.0.0.0 GRADIO_SERVER_PORT=$PORT exec python app.py"]
