#!/usr/bin/env bash
# Zero-shot on MSVD with InternVideo's tower (ViT-L/14), averaged with CLIP's weights. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" zeroshot msvd \
  --mergeclip True --mergeweight 0.25 \
  --batch_size_val 32 --max_words 77 --max_frames 12 --num_thread_reader 8 --interaction no \
  "$@"
