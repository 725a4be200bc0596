// One part of a command; main.nf uses it several times.
process part {
    tag "${command} ${number}/${params.parts}"
    cpus 2
    errorStrategy 'retry'
    maxRetries 2

    input:
    val ready
    val command
    each number

    output:
    val true

    script:
    """
    cd '${launchDir}'
    export OMP_NUM_THREADS=${task.cpus} NUMBA_NUM_THREADS=${task.cpus}
    census-scvi ${command} --config '${params.config}' --part ${number}/${params.parts}
    """
}

// A whole command; it does what parts have left, and joins them.
process whole {
    tag "${command}"
    cpus 8

    input:
    val ready
    val command

    output:
    val true

    script:
    """
    cd '${launchDir}'
    census-scvi ${command} --config '${params.config}'
    """
}
