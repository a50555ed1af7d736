#!/usr/bin/env bash
# Starts main_task_retrieval.py for the scripts of zeroshot_scripts, finetune_scripts and eval_finetuned_scripts:
#   launch.sh KIND DATATYPE FLAG...
# KIND: zeroshot, train (InternVideo's tower), ret (plain CLIP), finetuned. The last of a repeated flag counts.
set -euo pipefail

kind=$1 datatype=$2
shift 2
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
name=${datatype/#activity/activitynet}

stop() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

count_gpus() {
  local -a visible
  local found=0
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    [[ ${visible[0]:-} == -1 ]] || found=${#visible[@]}
  elif command -v nvidia-smi >/dev/null; then
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  fi
  echo $((found > 0 ? found : 1))
}

DATA_PATH=${DATA_PATH:-$root/data/$datatype}
video_folder=videos
[[ $datatype != msrvtt ]] || video_folder=videos/all
VIDEO_PATH=${VIDEO_PATH:-$DATA_PATH/$video_folder}
CLIP=${CLIP:-ViT-L/14}
NPROC=${NPROC:-$(count_gpus)}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x $root/.venv/bin/python ]] || PYTHON=$root/.venv/bin/python
fi

case $kind in
  zeroshot)
    about="zero-shot evaluation with InternVideo's tower"
    what="InternVideo's pre-trained checkpoint"
    script=zeroshot_scripts/eval_$name.sh
    OUTPUT=${OUTPUT:-$root/runs/zeroshot_$name}
    WEIGHTS=${WEIGHTS:-$root/weights/InternVideo-MM-L-14.ckpt}
    flags=(--do_eval --clip_evl --compat internvideo --pretrained_clip_name "$CLIP" --pretrained_path "$WEIGHTS")
    ;;
  train)
    about="full fine-tuning of InternVideo's tower"
    what="InternVideo's pre-trained checkpoint"
    script=finetune_scripts/train_$name.sh
    OUTPUT=${OUTPUT:-$root/runs/train_$name}
    WEIGHTS=${WEIGHTS:-$root/weights/InternVideo-MM-L-14.ckpt}
    flags=(--do_train --clip_evl --compat internvideo --pretrained_clip_name "$CLIP" --pretrained_path "$WEIGHTS")
    ;;
  ret)
    about="full fine-tuning of a plain CLIP"
    what="a CLIP: ViT-B/32, ViT-B/16, ViT-L/14 (downloaded on first use) or a file"
    script=finetune_scripts/ret_$name.sh
    OUTPUT=${OUTPUT:-$root/runs/ret_$name}
    default=ViT-B/16
    [[ $datatype != msrvtt ]] || default=ViT-B/32
    WEIGHTS=${WEIGHTS:-$default}
    CLIP=$WEIGHTS
    flags=(--do_train --pretrained_clip_name "$WEIGHTS")
    ;;
  finetuned)
    about="evaluation of a fine-tuned checkpoint of InternVideo's tower"
    what="a fine-tuned checkpoint; the default is what finetune_scripts/train_$name.sh writes"
    script=eval_finetuned_scripts/eval_finetuned_$name.sh
    OUTPUT=${OUTPUT:-$root/runs/eval_finetuned_$name}
    WEIGHTS=${WEIGHTS:-$root/runs/train_$name/pytorch_model.bin}
    flags=(--do_eval --clip_evl --compat internvideo --pretrained_clip_name "$CLIP" --finetuned_path "$WEIGHTS")
    ;;
  *) stop "launch.sh: KIND must be zeroshot, train, ret or finetuned, got $kind" ;;
esac

# The rule that produced the published numbers of each dataset.
frame_rule=stride
[[ $datatype != msvd && $datatype != activity ]] || frame_rule=second
flags+=(--datatype "$datatype" --features_path "$VIDEO_PATH" --output_dir "$OUTPUT" --frame_rule "$frame_rule")
if [[ $datatype == msrvtt ]]; then
  flags+=(--data_path "$DATA_PATH/MSRVTT_data.json" --train_csv "$DATA_PATH/MSRVTT_train.9k.csv"
    --val_csv "$DATA_PATH/MSRVTT_JSFUSION_test.csv")
else
  flags+=(--data_path "$DATA_PATH")
fi
flags+=(--sim_header meanP --loose_type --linear_patch 2d --slice_framepos 2 --feature_framerate 1 --n_display 50
  --max_words 32 --max_frames 12 --epochs 5 --batch_size 128 --coef_lr 1e-3)
# On the test split, which --compat internvideo would take, only where there is no other.
[[ $datatype == msrvtt || $datatype == activity ]] || flags+=(--select_on val)

if ((${SLURM_STEP_NUM_TASKS:-1} > 1)); then
  launcher=("$PYTHON") # srun has already started one of these per task
elif [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]] && ((${SLURM_NTASKS:-1} > 1)); then
  launcher=(srun --kill-on-bad-exit=1 "$PYTHON") # one failed task ends the others, which would wait for it
elif ((NNODES > 1)); then
  launcher=("$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK"
    --nproc_per_node "$NPROC" --master_addr "${MASTER_ADDR:-}" --master_port "$MASTER_PORT")
elif ((NPROC > 1)); then
  launcher=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC")
else
  launcher=("$PYTHON")
fi

asked_for_help=false
for argument in "$@"; do
  case $argument in
    -h | --help) asked_for_help=true ;;
    *) flags+=("$argument") ;;
  esac
done
command=("${launcher[@]}" "$root/main_task_retrieval.py" "${flags[@]}")

if [[ $asked_for_help == true ]]; then
  cat <<HELP
$script [FLAG...]
$about on $datatype. Further flags are added to the command below and win over its own;
main_task_retrieval.py --help lists them all.

Environment variables and their values now:
  DATA_PATH    folder of the annotation files (data/README.md)      $DATA_PATH
  VIDEO_PATH   folder of the video files                            $VIDEO_PATH
  WEIGHTS      $what
               $WEIGHTS
  CLIP         InternVideo's tower: the CLIP that --mergeclip averages with   $CLIP
  OUTPUT       where the run writes                                 $OUTPUT
  NPROC        processes on this machine; default: its GPUs, else 1   $NPROC
  NNODES       machines; NODE_RANK, MASTER_ADDR and MASTER_PORT with more than one   $NNODES
  PYTHON       interpreter; default: .venv of the repository, else python3   $PYTHON
Inside a SLURM allocation of several tasks srun starts one process per task; NPROC and NNODES are not used.

Runs:
  $(printf '%q ' "${command[@]}")
HELP
  exit 0
fi

[[ -d $DATA_PATH ]] || stop "no folder $DATA_PATH: set DATA_PATH to the folder of $datatype's annotation files"
[[ -d $VIDEO_PATH ]] || stop "no folder $VIDEO_PATH: set VIDEO_PATH to the folder of $datatype's video files"
[[ -f $WEIGHTS || ($kind == ret && $WEIGHTS == ViT-*) ]] || stop "no file $WEIGHTS: set WEIGHTS to $what"
[[ -f $CLIP || $CLIP == ViT-* ]] || stop "no file $CLIP: set CLIP to ViT-L/14 or the file of a CLIP"
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || stop "NPROC must be a number of processes, got $NPROC"
((NNODES == 1)) || [[ -n ${MASTER_ADDR:-} ]] || stop "NNODES is $NNODES: set MASTER_ADDR to the host of NODE_RANK 0"

exec "${command[@]}"
