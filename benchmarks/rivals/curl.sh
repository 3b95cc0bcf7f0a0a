#!/bin/sh
# Without a programming language: `split` cuts the list, `curl` sends the pieces, sixteen at a time.
# Usage: curl.sh ROWS BASE_URL FOLDER; prints the number of created instances.
set -eu
rows=$1 url=$2/accounts/acct/workflows/bench/instances/batch folder=$3
mkdir -p "$folder/parts" "$folder/answers"
split -l 100 -a 5 --filter='{ printf "["; paste -sd, -; printf "]"; } > "$FILE"' "$rows" "$folder/parts/"
for part in "$folder"/parts/*; do
  printf 'url = "%s"\nheader = "Authorization: Bearer %s"\nheader = "Content-Type: application/json"\n' "$url" "$CLOUDFLARE_API_TOKEN"
  printf 'data-binary = "@%s"\noutput = "%s/answers/%s"\nnext\n' "$part" "$folder" "${part##*/}"
done | sed '$d' > "$folder/config"
curl --silent --no-progress-meter --parallel --parallel-max 16 --config "$folder/config"
cat "$folder"/answers/* | grep -o '"status":"queued"' | wc -l
