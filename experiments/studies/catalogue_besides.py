"""The lines of `docs/methods.md` on where sparse networks come from: what is no optimizer, or is one by a line.

Costs are in units of a dense training run or of its steps; claims are those of docs/results/claims.md.
"""

from experiments.report.page import markdown_table

HEAD = """
## Where sparse networks come from

What gives masks before training, finds them over whole runs, or is a module or a measure rather than a wrapped
optimizer. **Costs** beyond a training run; **stores** besides weights and optimizer; **claim**: what
[the small experiments](results/claims.md) say of the published one ("card" where only the tests hold it to its formulas).

"""

COLUMNS = ["what", "in one line", "costs", "stores", "claim"]

ROWS = [
    # At initialisation
    ["SNIP, GraSP", "`static(tx, masks=tickets.keep(snip(loss, params, batches), params, s))`", "1, 2 gradients", "masks", "shuffled masks are worse (SNIP) or better (GraSP): fails here"],
    ["SynFlow", "`static(tx, masks=synflow(forward, params, x, s))`", "100 gradients of one input", "masks", "no empty layer at 1000x: holds"],
    ["Sketching (PaI)", "`tickets.sketch(scores, params, s)`: a lot in place of a ranking", "as the scores", "masks", "card: error formula, inclusion by enumeration"],
    ["Random, budgets by layer", "`static(tx, s, allocation=score_ratios(...))`", "-", "masks", "see [static](results/compare.md)"],
    ["Robust pruning at init", "`tickets.critical_variances`, `rescale_energy`", "-", "-", "card: second moments restored"],
    ["Sparsity-inducing activations", "`nn.clipped_relu(s, m)` with `critical_variances`", "-", "-", "clipped networks stay stable over depth, unclipped do not: holds (test)"],
    ["Graph priors", "`tickets.layered`, `nn.GraphNetwork`; `allocation=\"global_rms\"`", "-", "masks in the module", "card"],
    ["Spectrum-preserving sampling", "`tickets.sample_spectrum`", "bisection", "-", "less spectral error than a threshold on rank 1 plus noise: holds (test)"],
    # Tickets
    ["Lottery tickets, rewinding", "`experiments.tickets.rounds`; `analysis.connectivity.line`", "a run per level", "state at step k", "late rewinding wins where runs from 0 are not connected: holds"],
    ["AP", "`rounds(prune=by_magnitude(p, activate=q))`", "as the rounds", "weights at the start of a round", "fewer dead neurons: holds; accuracy within a deviation"],
    ["Edge-Popup", "`edge_popup(tx, s)`, `signed_constant()`", "dense gradients", "weights twice, scores, their slots", "rises with width, stays below a trained network of the same width"],
    ["Movement pruning", "`movement`, `soft_movement`", "dense gradients", "weights twice, scores, their slots", "see [the comparison](results/compare_mnist1d_mlp.md)"],
    ["Lottery jackpots", "`lottery_jackpots`, from trained weights", "dense gradients", "as Edge-Popup", "card"],
    ["Random search", "`experiments.tickets.random_search`", "R forward passes", "-", "no better after training: holds"],
    ["Tickets of evolution strategies", "`experiments.tickets.evolution`", "a search per level", "mean and spread of kept weights", "card: steep directions are kept"],
    ["Plant 'n' Seek", "`experiments.tickets.plant`", "a run per level", "the planted truth", "found at moderate, missed at extreme sparsity: holds"],
    ["Sparse model soups", "`experiments.tickets.averages.sparse_soups`, `tickets.greedy_soup`", "m runs per phase", "m networks", "soup as its members: fails here"],
    ["SWAMP", "`experiments.tickets.averages.swamp`", "m runs per level", "m networks, their averages", "average as a particle: fails here"],
    ["Transfer of tickets", "`experiments.tickets.transfer`: prompts, probes, calibration", "steps on a border or a head", "program and label map", "card"],
    # Fixed weights
    ["FISH mask", "`anchored(tx, tickets.fish_mask(fisher(...), params, 0.005), compact=True)`", "a gradient per example", "places and values of trained weights", "card: counts, closed form of the Fisher information"],
    ["FreezeNet", "`anchored(tx, tickets.keep(snip(...), params, 0.99))`, `engines.save_seeded`", "as SNIP; dense when it serves", "a seed and changed weights", "card: restored bit by bit"],
    ["Pruning and freezing", "`tickets.three_valued(tx, kinds)`", "-", "two masks", "card: each limit bit by bit"],
    # Gates and Bayes
    ["L0 gates", "`l0(tx)`, or `nn.HardConcreteGate`", "-", "a logit per group", "card: gradient is that of an integral"],
    ["Variational dropout", "`nn.VariationalDropoutLinear`", "two products", "a variance per weight", "noise is pruned, a signal is not: holds (test)"],
    ["SSVI", "`ssvi(tx, s)` with `nn.BayesianLinear`", "two products; dense gradients at updates", "mean and scale under one mask", "card"],
    ["CSQ", "`nn.BitPlaneLinear`, `nn.csq_loss`", "2n logits per weight", "bits and switches", "card: exact grid when hard"],
    ["DRESS", "`tickets.subnet_gradient` into `magnitude_ste`", "a gradient per subnet", "one kernel; subnets are prefixes", "card: nested, prefix equals mask"],
    ["Gradients through gates", "`nn.enumerated_gradient` and estimators", "2^n losses", "-", "unbiased, less variance by a baseline, straight-through biased: holds (test)"],
    # Regularisers and patterns
    ["Irrelevant weights", "`engines.selective_decay`, `tickets.prune_within`", "-", "a running mean of gradients", "card"],
    ["Pixelated butterfly", "`nn.PixelflyLinear` on the block-sparse product", "stored blocks, and rank r", "stored blocks", "card; speed as [products](kernels/block_sparse_matmul.md)"],
    ["DASS", "`experiments.tickets.dass`", "all operations at once", "scores of all", "the useful operation is chosen: holds (test)"],
    ["SAFS", "`nn.ScaledActivation`, `experiments.tickets.activation_search`", "a short run per choice", "two scales per layer", "card"],
    ["Sparse neural dynamics", "`nn.UnitChoice`, `collapse`, `relu_constraints`", "-", "three logits per unit", "card: exact collapse and encoding"],
    ["FedDIP", "`experiments.applications.feddip`", "raw weights on clients", "one mask", "95 % within the spread of the seeds: holds"],
    ["TEDDY", "`tickets.keep_edges`, `experiments.applications.teddy`", "one dense run for distillation", "-", "distillation holds; degrees no better than chance on graphs without hubs"],
    # Input
    ["FTWT", "`nn.FiringGate`", "a pooled linear head", "the head", "card: heads learn by their own loss only"],
    ["Semi-structured activation sparsity", "`nn.SpatialSparsity`, `nn.conv_at`", "less: kept positions only", "a map of positions", "card: equals the dense product there"],
    ["Delta activations", "`nn.DeltaActivation`", "-", "a step per channel", "card: linear in deltas"],
    # What pruning does
    ["PIE, class impact", "`analysis.impact`", "K networks of each kind", "predictions", "card: one of twenty by chance"],
    ["CEAG", "`analysis.constraints`", "-", "multipliers and buffers per group", "holds on the training set, not on the test set"],
    ["Populations", "`analysis.populations`", "K networks", "predictions", "card"],
]  # fmt: skip


def section() -> str:
    """The section of the page."""
    return HEAD + markdown_table(COLUMNS, ROWS) + "\n"
