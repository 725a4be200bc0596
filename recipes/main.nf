// The pipeline on any scheduler that Nextflow knows: nextflow run recipes/main.nf --config my-config.yaml --parts 32
// Every machine must see the folder in which it is started, the Census and the run directory.
// Before the includes, which read them.
params.config = 'scvi-config.yaml'
params.parts = 32

include { part as tally; part as recount; part as write; part as embed } from './part.nf'
include { whole as prepare; whole as train; whole as latent; whole as publish } from './part.nf'

workflow {
    numbers = Channel.of(1..params.parts)
    tallied = tally(true, 'prepare', numbers).collect()
    recounted = recount(tallied, 'prepare', numbers).collect() // only some data need it: otherwise these write the cells
    written = write(recounted, 'prepare', numbers).collect()
    trained = train(prepare(written, 'prepare'), 'train')
    embedded = embed(trained, 'create-latent-update', numbers).collect()
    publish(latent(embedded, 'create-latent-update'), 'publish')
}
