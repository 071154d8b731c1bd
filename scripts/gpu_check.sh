#!/usr/bin/env bash
# All checks of one GPU in under 8 minutes: tests, steps, packs, CUDA graphs, memory. Every part leaves a JSON file in OUT, and
# parts.json says how each ended. Parts that need CUDA say so on a CPU and are skipped. Settings:
#   OUT=DIR             [results/benchmarks/<name of the card>]
#   PARTS="steps ..."   [tests steps packs graphs memory]
#   LIMIT=SECONDS       for all parts together    [470]
#   SMALL=1             a small setting, to try the script on a CPU
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

card=$(python -c '
import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"))') || exit
out=${OUT:-results/benchmarks/$card} limit=${LIMIT:-470}
mkdir -p "$out"

steps=(--repeats 10) packs=(--repeats 5 --models deberta) graphs=(--repeats 20 --models deberta minilm) memory=()
tests=(tests/project/test_gpu.py)
if [ -n "${SMALL:-}" ]; then
    steps=(--repeats 1 --models minilm) packs=(--repeats 1 --warm-up 1 --models minilm --sizes 1 2)
    graphs=(--repeats 1 --models minilm) memory=(--batches 32)
    tests+=(-k "dropout_repeats")
fi

count_tests() {
    python - "$out" <<'END'
import json, pathlib, sys
import xml.etree.ElementTree as tree
folder = pathlib.Path(sys.argv[1])
(suite,) = tree.parse(folder / "tests.xml").getroot().iter("testsuite")
bad = sorted(case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None)
skipped = int(suite.get("skipped"))
content = {"passed": int(suite.get("tests")) - skipped - len(bad), "skipped": skipped, "failed": bad, "seconds": float(suite.get("time"))}
(folder / "tests.json").write_text(json.dumps(content, indent=1) + "\n")
(folder / "tests.xml").unlink()
print("tests:", content)
END
}

run_part() {
    case $1 in
    tests)
        timeout "$2" python -m pytest -n 0 -q "${tests[@]}" --junitxml "$out/tests.xml"
        local code=$?
        [ -f "$out/tests.xml" ] && count_tests
        return $code
        ;;
    steps) timeout "$2" python scripts/benchmark.py steps "${steps[@]}" --out "$out" ;;
    packs) timeout "$2" python scripts/benchmark.py packs "${packs[@]}" --out "$out" ;;
    graphs) timeout "$2" python scripts/benchmark.py graphs "${graphs[@]}" --out "$out" ;;
    memory) timeout "$2" python scripts/benchmark.py memory "${memory[@]}" --out "$out" ;;
    *) echo "error: PARTS=$1: allowed is tests steps packs graphs memory" >&2; exit 2 ;;
    esac
}

failed=0 lines=()
for part in ${PARTS:-tests steps packs graphs memory}; do
    begin=$SECONDS left=$((limit - SECONDS)) code=124
    if [ $left -gt 0 ]; then
        run_part "$part" "$left"
        code=$?
    fi
    case $code in 0) ended="done" ;; 124) ended="out of time" ;; *) ended="failed with exit code $code" ;; esac
    [ $code -eq 0 ] || failed=1
    lines+=("\"$part\": {\"ended\": \"$ended\", \"seconds\": $((SECONDS - begin))}")
    echo "$part: $ended after $((SECONDS - begin)) s"
done
(IFS=,; echo "{${lines[*]}}") | python -m json.tool >"$out/parts.json"
echo "$out: $SECONDS s in all"
exit $failed
