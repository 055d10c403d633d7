"""Long runs on real models. Each keeps what it has, and the same command goes on where it was.

OUT is the run's own folder, EDITS a folder with counterfact.json, zsre_mend.json, mquake.json, wikibigedit_3k.json,
elken.json and the folders 20q and pep3k, C key statistics: `d4s covariance smollm2 corpus.txt --tokens 50000
--out C`, 3 minutes, or the covariance.safetensors of an OUT. With SmolLM2-135M on two idle cores an edit takes 3 s with
d4s, 8 s with memit, memit-seq and alphaedit, 15 s with ROME; a point of 300 edits takes 2 minutes. Costs are those of
what is named; --counts, --methods, --facts, --neighborhood-limit and --task-limit make it more or less.

comparison   1,000 single CounterFact edits         python -m benchmarks.real.comparison smollm2 EDITS/counterfact.json
             by each method                         corpus.txt --text held_out.txt --out OUT
             cost: d4s 1 hour, memit 3 hours, ROME 5 hours
greedy       what its models say by themselves      python -m benchmarks.real.greedy OUT/sequences greedy.png
             cost: seconds
settings     λ, layers and the residual's rule      python -m benchmarks.real.settings smollm2 EDITS/counterfact.json
                                                    --covariance C --out OUT
             cost: 4 minutes, and 2 a setting
datasets     500 edits of zsRE, MQuAKE and          python -m benchmarks.real.datasets smollm2 EDITS corpus.txt
             WikiBigEdit                            --text held_out.txt --covariance C --out OUT
             cost: of each, d4s half an hour, memit 1½ hours, ROME 2½ hours; free generation 7 minutes a sequence
downstream   scores before and after                python -m benchmarks.real.downstream smollm2 OUT/edited
                                                    --data DOWNSTREAM --out DIR
tables       tables of any point, also under way    python -m benchmarks.real.tables OUT/sequences --at 300 --out DIR
             cost: seconds
claims       the paper's claims on what is there    python -m benchmarks.real.claims OUT/sequences --out DIR
             cost: seconds

The paper's tables and figures, each `d4s reproduce NAME smollm2 …` with --covariance C --out DIR:

table2       --edits EDITS/zsre_mend.json --counts 50,100,200
             cost: ROME, MEMIT, PMET, GRACE and d4s, 2 hours, and free generation of all edits at each point: 3 hours
table3       --edits EDITS/counterfact.json EDITS/mquake.json --counts 100,200
             cost: 5 methods on two data sets, 4 hours
table4       --edits EDITS/zsre_mend.json --counts 100,300 --facts 200 --text held_out.txt: unedited facts and text
             cost: 1 hour
table4       --edits EDITS/zsre_mend.json --counts 300 --task-folder TASKS --tasks arc_challenge,hellaswag,mmlu
             with TASKS of `d4s tasks make TASKS DOWNSTREAM --questions 200`; cost: 1 hour, and the tasks' four times
fig2         --edits EDITS/zsre_mend.json EDITS/elken.json EDITS/20q/edit_set.json EDITS/pep3k/edit_set.json
             --counts 25,50,100 --methods rome,memit --facts 200 --text held_out.txt
             cost: 100 edits of four data sets, ROME 2 hours, MEMIT 1 hour
fig3         --edits EDITS/counterfact.json --counts 25,50,100 --facts 200 --text held_out.txt
             cost: 100 edits in three forms, ROME 1½ hours, MEMIT ¾ of an hour
fig5         --edits EDITS/counterfact.json --counts 50,100,200,300; cost: ROME 1½ hours, MEMIT 1 hour
fig6         the same with --facts 200 --text held_out.txt; cost: MEMIT 1 hour, d4s ½ hour
fig7, fig8   --edits EDITS/counterfact.json --counts 50,100,200,300; cost: MEMIT 1 hour, d4s ½ hour

No cost of `reproduce` has been measured: each is its edits times what the comparison's took.
"""
