# ablate.py: the curriculum as scheduled, its mean from first to last step, and reversed
#
# All three read as many tokens of each domain, to 0.1%. Judge them by domain: runs.csv has that.

runs = {
    "4to1-swiglu": {"activation": "swiglu"},
    "mean": {"activation": "swiglu", "mixture": [
        [0, {"language": 0.35, "docs": 0.20, "science_math": 0.275, "code": 0.175}]]},
    "reversed": {"activation": "swiglu", "mixture": [
        [0, {"language": 0.25, "docs": 0.20, "science_math": 0.35, "code": 0.20}],
        [1, {"language": 0.45, "docs": 0.20, "science_math": 0.20, "code": 0.15}]]},
}
seeds = [1337, 1338, 1339]
baseline = "mean"
