"""`tokred.advise`: the method, the layers and the numbers of tokens for a budget.

1. The dense model answers the calibration images; every method is tried at one keep rate, on some
   of them, to see which disturb the model least.
2. What a block costs as a function of its tokens, and what a method adds to it, is measured on this
   machine (`tokred.profile`) and fitted by parabolas.
3. Of the methods that disturb least, it is measured how much a reduction at one layer alone
   disturbs the model, for several layers and shares: the mean divergence from the dense model's
   answers. A schedule is taken to disturb as much as its steps together: a step from n to k tokens
   at layer l as much as k tokens from there on more than n tokens from there on.
4. Dynamic programming over layers and numbers of tokens finds the schedules that should disturb
   least, for every time they may take. The one for the budget is compared with the uniform keep
   rate, and the better of them improved by small changes, each of them tried.
5. Those that should meet the budget, and uniform keep rates of the best methods that should, are
   measured: on all of the images, and their time in turns with the dense model's. What misses the
   budget is tried again, with fewer tokens. The best one is the advice.
"""
