# shellcheck shell=bash
# What the job scripts share. Sourced, never run. Needs NMAR_HOME, the folder of this project.
#
# Variables (all optional): NMAR_VENV, a virtual environment; NMAR_CONTAINER, an image that
# apptainer runs; NMAR_PREFLIGHT=0, no look at the nodes first; NMAR_MAX_FAILURES (3) and
# NMAR_MAX_INTERRUPTIONS (10), attempts in a row without a new checkpoint before a job gives up.

say() { # a line of the job's log
    printf '%s slurm: %s\n' "$(date -u +%FT%TZ)" "$*"
}

die() { # CODE TEXT
    say "error: $2"
    exit "$1"
}

whole_number() { # NAME VALUE: ends the job if it is none
    [[ $2 =~ ^[0-9]{1,9}$ ]] || die 2 "$1: is '$2', expected a whole number"
}

set_up() { # sets the array nmar_python: the interpreter, inside the container if there is one
    case "$NMAR_HOME" in
        *:*) die 2 "$NMAR_HOME: has a colon in its name, where no Python finds it; expected another" ;;
    esac
    whole_number NMAR_MAX_FAILURES "${NMAR_MAX_FAILURES:-3}"
    whole_number NMAR_MAX_INTERRUPTIONS "${NMAR_MAX_INTERRUPTIONS:-10}"
    export PYTHONPATH="$NMAR_HOME${PYTHONPATH:+:$PYTHONPATH}"
    nmar_python=(python3)
    if [ -n "${NMAR_CONTAINER:-}" ]; then
        command -v apptainer > /dev/null || die 2 "NMAR_CONTAINER is set, but there is no apptainer"
        case "$NMAR_HOME$PWD" in # apptainer takes both for marks in a list of binds
            *[:,]*) die 2 "$NMAR_HOME or $PWD: has a colon or comma, expected none with NMAR_CONTAINER" ;;
        esac
        nmar_python=(apptainer exec --nv --bind "$NMAR_HOME" --bind "$PWD" "$NMAR_CONTAINER" python3)
        [ -z "${NMAR_VENV:-}" ] || die 2 "NMAR_VENV and NMAR_CONTAINER are both set, expected one"
    elif [ -n "${NMAR_VENV:-}" ]; then
        [ -x "$NMAR_VENV/bin/python" ] || die 2 "NMAR_VENV: no $NMAR_VENV/bin/python"
        export PATH="$NMAR_VENV/bin:$PATH"
        nmar_python=("$NMAR_VENV/bin/python")
    fi
}

get() { # KEY ARGUMENTS: the values of a configuration's key, each ended by a zero byte
    local key=$1
    shift
    "${nmar_python[@]}" -m nmar_ds.config --null --get "$key" "$@"
}

learn_output() { # ARGUMENTS: sets nmar_output; a bad configuration ends the job here, in seconds
    local answer code=0
    answer=$(mktemp)
    get output "$@" > "$answer" || code=$?
    nmar_output=
    IFS= read -r -d '' nmar_output < "$answer" || true
    rm -f "$answer"
    if [ "$code" -ne 0 ] || [ -z "$nmar_output" ]; then
        [ "$code" -eq 2 ] || say "the interpreter (${nmar_python[*]}) ended with $code"
        die 2 "the configuration or the interpreter is not usable (see above): not requeued"
    fi
}

meeting_place() { # rank 0's host and port; nmar_ds/training/schedulers.py has the same formula
    local nodes
    whole_number SLURM_JOB_ID "$SLURM_JOB_ID"
    if [ -z "${MASTER_ADDR:-}" ]; then
        nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die 1 "scontrol show hostnames failed"
        MASTER_ADDR=${nodes%%$'\n'*}
    fi
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
}

newest() { # the newest checkpoint by name, or "none"
    local latest="$nmar_output/checkpoints/latest"
    if [ -r "$latest" ]; then cat -- "$latest"; else echo none; fi
}

num_alike() { # FILE LINE: append LINE; how many of the last lines are the same
    printf '%s\n' "$2" >> "$1"
    tac -- "$1" | nmar_line=$2 awk '$0 != ENVIRON["nmar_line"] { exit } { n++ } END { print n + 0 }'
}

job_state() {
    scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'
}

requeue() { # WHY: give the job back to the queue, unless it was cancelled
    local state
    state=$(job_state)
    if [ "$state" != RUNNING ] && [ -z "$nmar_warned" ]; then
        die 1 "$1; the job is $state, so it was ended from outside: not requeued"
    fi
    say "$1: requeued"
    scontrol requeue "$SLURM_JOB_ID" || die 1 "scontrol requeue failed (is the job --requeue?)"
    sleep 120 # Slurm ends this shell
    exit 1
}

forward() { # SIGNAL: to the ranks, which save and end
    say "got SIG$1: the ranks are told to save and end"
    [ "$1" != USR2 ] || nmar_warned=1
    nmar_signalled=1
    [ -z "$nmar_step" ] || kill -USR2 "$nmar_step" 2> /dev/null || true
}

run_step() { # COMMAND: under srun, signals passed on; sets nmar_code
    local code
    nmar_step=
    srun --kill-on-bad-exit=1 "$@" &
    nmar_step=$!
    [ -z "$nmar_signalled" ] || kill -USR2 "$nmar_step" 2> /dev/null || true
    while true; do # a trap interrupts wait
        code=0
        wait "$nmar_step" || code=$?
        kill -0 "$nmar_step" 2> /dev/null || break
    done
    wait "$nmar_step" || code=$?
    nmar_code=$code nmar_step=
}

decide() { # what the end of the training step means; ends the script
    local line='' codes="$NMAR_EXIT_CODES" notes alike
    notes=$(dirname -- "$codes")
    [ ! -e "$codes/2" ] || die 2 "bad input (exit 2, see above): not requeued"
    [ ! -e "$codes/3" ] || die 3 "no progress (exit 3, see above): not requeued"
    if [ -e "$codes/4" ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
        die 4 "the run folder is in use (exit 4, see above): not requeued"
    fi
    if [ "$nmar_code" -eq 0 ]; then
        IFS= read -r line < "$nmar_output/outcome" || true
        say "the ranks ended well; outcome: ${line:-missing}"
        case "$line" in
            complete*) exit 0 ;;
            stopped*) die 6 "stopped for good; the jobs that wait for this one will not start" ;;
            interrupted*) ;;
            *) die 1 "no word in $nmar_output/outcome: not requeued" ;;
        esac
    else
        say "the ranks ended with $nmar_code; newest checkpoint: $(newest)"
    fi
    if [ "$nmar_code" -eq 0 ] || [ -n "$nmar_signalled" ]; then
        alike=$(num_alike "$notes/interrupted" "$(newest)")
        [ "$alike" -lt "${NMAR_MAX_INTERRUPTIONS:-10}" ] ||
            die 3 "$alike interruptions in a row without a new checkpoint: not requeued; is the time limit too short?"
        requeue "interrupted, newest checkpoint $(newest)"
    fi
    alike=$(num_alike "$notes/failed" "$(newest)")
    [ "$alike" -lt "${NMAR_MAX_FAILURES:-3}" ] ||
        die 3 "$alike failed attempts in a row without a new checkpoint: not requeued; their messages are above"
    requeue "failed attempt $alike at checkpoint $(newest)"
}
