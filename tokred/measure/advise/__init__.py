"""`tokred.advise`: finds the method, the layers and the numbers of tokens for a budget.

1. The dense model answers the calibration images. Every method is tried at one keep rate on some of
   the images, to see which methods disturb the model least.
2. The time of a block is measured on this machine (`tokred.profile`) and fitted by a parabola of
   the number of tokens. So is the time that each method adds to a block.
3. For the methods that disturb least, it is measured how much a reduction at a single layer
   disturbs the model: the mean divergence from the dense model's answers, for several layers and
   shares of tokens. The disturbance of a schedule is taken to be the sum over its steps. A step
   from n to k tokens at layer l counts the disturbance of "k tokens from layer l on" minus that of
   "n tokens from layer l on".
4. Dynamic programming over layers and numbers of tokens finds the schedules that should disturb
   least, for every time they may take. The schedule for the budget is compared with the uniform
   keep rate. The better of the two is improved by small changes, each of which is tried.
5. The schedules that should meet the budget are measured, and so are uniform keep rates of the best
   methods: on all of the images, and in turns with the dense model. If a setting misses the budget,
   another one with fewer tokens is tried. The best setting that meets the budget is the advice.
"""
