"""Hours of the paper's PPO schedule on the machine of a latency.csv: 200 iterations x 64 prompts x
3 pruning steps = 38,400 evaluations, each a pass from the pruned prompt to the last token, at the
rate of the largest batch."""

import csv
import sys

EVALUATIONS = 200 * 64 * 3
with open(sys.argv[1], newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["pruner"] in ("keep_all", "tprl")]
largest = max(int(row["batch_size"]) for row in rows)
for row in rows:
    batch = int(row["batch_size"])
    if batch in (1, largest):
        each = sum(float(row[f"{stage}_ms"]) for stage in ("selector", "prefill", "decode")) / batch
        kept, hours = float(row["kept_tokens_layer_mean"]), EVALUATIONS * each / 3.6e6
        print(
            f"{row['pruner']}, {kept:.0f} tokens, batch {batch}: "
            f"{each:.1f} ms per evaluation, {hours:.2f} hours"
        )
