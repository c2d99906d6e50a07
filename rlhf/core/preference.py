"""The Bradley-Terry loss of a reward model: elementwise, minimised, torch only."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: float | Tensor = 0.0, center_coefficient: float = 0.0
) -> Tensor:
    """Loss per pair: -log sigmoid(r_chosen - r_rejected - margin) + center_coefficient * (r_chosen + r_rejected)^2.

    The first term is the negative log-likelihood of the pair when P(chosen preferred) = sigmoid(r_chosen - r_rejected)
    (Bradley and Terry 1952; Stiennon et al. 2020, arXiv 2009.01325). A `margin` > 0 asks for a wider gap (Llama 2,
    arXiv 2307.09288). The first term leaves a constant added to all scores undetermined; `center_coefficient` > 0 fixes
    it by pulling the sum of each pair to 0 (arXiv 2312.09244).

    Both scores are (pairs,); `margin` is a number or (pairs,). Does not reduce.
    """
    loss = -logsigmoid(chosen_scores - rejected_scores - margin)  # unlike log(sigmoid), exact for wide gaps
    return loss + center_coefficient * (chosen_scores + rejected_scores).square()
