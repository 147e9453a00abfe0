#!/usr/bin/env bash
# What is measured on a GPU host, part by part:
#
#   benchmarks/gpu_host.sh FOLDER PART...
#
# PYTHON         with TensorRT                           (default python3)
# TORCH_PYTHON   with torch, for exports and refinement  (default PYTHON)
# ISBI_ROOT, CAMVID_ROOT                                 as for the configurations
# KERAS_ONNX     what `keras_unet.py train` exported, for keras
# BACKEND        onnxruntime to try a part without a GPU (default tensorrt)
# DATE           of the measurement, where the host's clock is wrong
#
# What is made lies in FOLDER, and what is worth keeping in FOLDER/results. On an H200 with 16 cores the parts took:
# networks 65 s, predict 260 s, refined 155 s and engines 250 s, pruned 330 s, detector 450 s, wts 220 s, keras 195 s, a
# dozen of the tries 250 to 500 s; fleet, with two GPUs, 230 s.
set -euo pipefail
folder=$(realpath -m "$1")
results=$folder/results build=$folder/build
shift
cd "$(dirname "$0")/.."
mkdir -p "$results"
PYTHON=${PYTHON:-python3} TORCH_PYTHON=${TORCH_PYTHON:-$PYTHON} BACKEND=${BACKEND:-tensorrt}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Later on, exit code 1 is a failed check.
"$PYTHON" -c 'import pipeline.cli'
"$TORCH_PYTHON" -c 'import pipeline.cli, torch'
dated=(${DATE:+--date "$DATE"})

trt() { "$PYTHON" -m pipeline "$@"; }
# A failed check, exit code 1, is a result.
measured() { "$@" || [ $? = 1 ]; }
torch() { "$TORCH_PYTHON" -m pipeline "$@"; }

# keep NAME PATH...: reports and other small files of folders below FOLDER, packed.
keep() {
  (cd "$folder" && find "${@:2}" -type f -size -700k ! -name '*.onnx' ! -name '*.engine' ! -path '*/overlays/*' \
    ! -path '*/masks/*' ! -name '*timing.cache' -print0 | tar czf "results/$1.tgz" --null -T -)
}

# judged CONFIG: export with torch, all else with TensorRT, then every tensor along the network.
judged() {
  local common=(-c "configs/$1.yaml" --build-dir "$build")
  local chosen=(--backend "$BACKEND" -p fp32 -p fp16 -p int8)
  if [ "$1" != keras ]; then torch export "${common[@]}"; fi
  measured trt run "${common[@]}" "${chosen[@]}"
  if [ "$1" != detector ]; then measured trt validate "${common[@]}" "${chosen[@]}" --layers; fi
  keep "$1" "build/$1"
}

networks() { # UNets of 64 base channels for batches of 1 and 8
  "$TORCH_PYTHON" benchmarks/performance.py export "$folder" --networks unet unet-nearest unet-upconv camvid
  for name in raw raw-8; do trt clean "$folder/unet/$name.onnx" -o "$folder/$name-clean.onnx"; done
}

predict() {
  "$PYTHON" benchmarks/predict.py "$folder/raw-clean.onnx" "$folder/predict" -o "$results/predict.json" \
    --folder-clean "$folder/raw-8-clean.onnx" --torch-python "$TORCH_PYTHON" --jobs masks nothing --seconds 3 \
    --streams 1 2 3 --repeats 5 "${dated[@]}"
}

fleet() { # needs ray beside TensorRT
  "$PYTHON" benchmarks/fleet.py "$folder/raw-clean.onnx" "$folder/fleet" -o "$results/fleet.json" --passes 12 "${dated[@]}"
}

refining=(--set calibrate.images=68 --set calibrate.refine_steps=600 --set calibrate.calibrator=cpu
  --set mixed.images=32 --set mixed.min_agreement=null)

refined() { # camvid's calibration
  for stage in export clean calibrate; do
    torch "$stage" -c configs/camvid.yaml --build-dir "$folder/refined" "${refining[@]}"
  done
}

engines() { # of that calibration
  measured trt run -c configs/camvid.yaml --build-dir "$folder/refined" "${refining[@]}" --backend "$BACKEND" \
    -p fp16 -p int8 -p mixed
  keep refined refined
}

detector() {
  judged detector
  "$PYTHON" benchmarks/detector.py table "$build/detector" -o "$results/detector-table.json"
  "$PYTHON" - "$folder/frames.tiff" <<'P'
import sys
from pathlib import Path

from PIL import Image

from pipeline.config import load_config
from pipeline.data.dataset import open_dataset

config = load_config(Path("configs/detector.yaml"))
samples = open_dataset(config.data, config.preprocessing, "validation")
first, *others = (Image.fromarray(sample.image).resize((480, 360)) for sample in samples)
first.save(sys.argv[1], save_all=True, append_images=others)
P
  for model in export/model.onnx engine/{fp32,fp16,int8}/model.engine; do
    if [ -e "$build/detector/$model" ]; then
      echo "$model: $("$PYTHON" benchmarks/detector.py frames "$build/detector/$model" "$folder/frames.tiff" | tail -n 1)"
    fi
  done | tee "$results/detector-frames.txt"
}

keras() { judged keras; }
wts() { judged wts; }

tries() { # of docs/performance.md: the fifth run's of the UNet, and what it lists as not yet tried
  timed() { "$PYTHON" benchmarks/performance.py engines "$folder" -o "$results/performance.json" "${dated[@]}" "$@"; }
  timed --networks unet --tries "int8, shared" "int8, shared, relu" "int8, shared, relu in int8*" \
    "int8, shared, kept in L2" "int8, shared, timed 8 times" "int8, shared, level 2" "*, 16 threads" "fp16" "fp16, relu" \
    "int8*takes*" "int8, shared, gives half" "fp16, takes*" "*sparse*"
  timed --networks unet-nearest --tries "int8, shared" "int8, shared, transposed*"
  timed --networks unet-upconv --tries "fp16" "int8, shared" "*, folded"
  timed --networks camvid --camvid "$CAMVID_ROOT" --tries "fp16" "fp16, relu" "int8, shared" "int8, shared, relu in int8*"
}

pruned() { # camvid, two of four weights zero: against its own FP32, then against the whole network's
  local clean=$folder/whole/camvid/clean/model.onnx images=$CAMVID_ROOT/val/images labels=$CAMVID_ROOT/val/labels
  torch clean -c configs/camvid.yaml --build-dir "$folder/whole"
  torch prune "$clean" --images "$CAMVID_ROOT/train/images" -o "$folder/pruned.onnx" --steps 1519
  measured trt run -c configs/camvid.yaml --build-dir "$folder/pruned" --backend "$BACKEND" -p fp16 -p int8 \
    --set "network={onnx: $folder/pruned.onnx}" --set engine.sparsity=true --set calibrate.images=64
  measured trt validate "$clean" --engine "$folder/pruned.onnx" --images "$images" --labels "$labels" -o "$folder/judged/fp32"
  for precision in fp16 int8; do
    for model in "$folder/pruned/camvid/engine/$precision"/model.{engine,onnx}; do
      if [ -e "$model" ]; then
        measured trt validate "$clean" --engine "$model" --images "$images" --labels "$labels" \
          -o "$folder/judged/$precision"
        break
      fi
    done
  done
  cp "$folder/pruned.onnx.json" "$results/"
  keep pruned pruned judged
}

threads() { # of the build: of SiLUs, whose kernels TensorRT compiles itself
  for stage in export clean; do torch "$stage" -c configs/detector.yaml --build-dir "$folder/threads-1"; done
  rm -rf "$folder/threads-16" && cp -r "$folder/threads-1" "$folder/threads-16"
  for count in 1 16; do
    trt engine -c configs/detector.yaml --build-dir "$folder/threads-$count" -p fp16 --set engine.build_threads="$count"
  done
  keep threads threads-1 threads-16
}

tests() { "$PYTHON" -m pytest tests/gpu -m gpu; }

for part in "$@"; do
  case $part in
    networks | predict | fleet | refined | engines | pruned | detector | keras | wts | tries | threads | tests) ;;
    *) echo "gpu_host.sh: there is no part $part" >&2 && exit 2 ;;
  esac
done
for part in "$@"; do
  echo "== $part, $(date +%T)"
  "$part"
done
