# The slice and the run: read by every script here. What the environment sets goes before what stands here;
# TPU_CONFIG names another file than this one.
# shellcheck shell=bash disable=SC2034

# Where and what. `gcloud compute tpus accelerator-types list --zone=...` says what a zone has.
PROJECT=${PROJECT:-}                   # of Google Cloud
ZONE=${ZONE:-}                         # europe-west4-b
NAME=${NAME:-}                         # of the slice, and of its place in the queue
TYPE=${TYPE:-}                         # v5litepod-8, v6e-16
RUNTIME=${RUNTIME:-}                   # v2-alpha-tpuv5-lite, v2-alpha-tpuv6e
QUEUED=${QUEUED:-1}                    # 1 asks through the queue, 0 wants the slice at once
SPOT=${SPOT:-1}                        # 1 takes what may be preempted, 0 pays for what stays

# What runs. All workers run the same command; WORKDIR in a bucket outlives the slice.
WORKDIR=${WORKDIR:-}                   # gs://bucket/hmmt, or on slices of one host a folder, runs/hmmt
RUN=${RUN:-}                           # --config=configs/hmmt.py --config.data.train=train.jsonl ...
FILES=${FILES:-}                       # copied into the project on every worker: train.jsonl env.sh

PYTHON=${PYTHON:-3.12}                 # fetched by uv if the image lacks it
POLL=${POLL:-60}                       # seconds between two looks at a state
