"""Everyday texts for the gate of quantized precisions, written for this project, like its code.

The rounding of a quantized precision hits some texts far more than others: those with few tokens and plain words, which
activate single channels. So the gate has many such texts. None of them is calibrated on.
"""

from __future__ import annotations

EVERYDAY_PROBES: tuple[tuple[bool, str], ...] = (
    *(
        (False, sentence)
        for sentence in (
            "A man is playing the trumpet.",
            "A girl is brushing her hair.",
            "The lady is wearing a yellow hat.",
            "Somebody is slicing a tomato.",
            "Two dogs are running along the beach.",
            "A person is writing on a board.",
            "A woman is stirring soup.",
            "The boy kicked the ball into the net.",
            "A man is singing and tapping his foot.",
            "Nobody is in the room.",
            "The kids are not dancing.",
            "A bird sits on a wire.",
            "She opens a letter.",
            "A man rides a motorcycle down a dirt road.",
            "The baby laughs at a kitten.",
            "Several women are standing in a queue.",
            "A panda is eating bamboo.",
            "A train enters the station.",
            "Someone is folding paper.",
            "The chef is frying fish in a pan.",
            "A monkey is swinging from a branch.",
            "They were walking home in the snow.",
        )
    ),
    *(
        (instructed, question)
        for question, instructed in (
            ("how do I activate my new bank card", True),
            ("how do I activate my new bank card", False),
            ("Who invented the safety pin?", True),
            ("what colour is a polar bear's skin", False),
            ("does vitamin C shorten a cold", True),
            ("what are the wages of fear about", False),
            ("effect of surface roughness on drag at supersonic speed", True),
            ("effect of surface roughness on drag at supersonic speed", False),
            ("why was my transfer rejected?", False),
            ("Which planet has the most moons?", True),
            ("when does the last ferry leave", False),
            ("play some jazz in the kitchen", False),
        )
    ),
    *(
        (False, passage)
        for passage in (
            "i feel rather lonely since my sister moved out",
            "i was thrilled and a bit nervous about the trip",
            "My order arrived today, but one of the cups is missing.",
            "Reading a large file line by line in C#",
            "Drupal module that hides a form field",
            "Profit rose 12 percent to $1.4 billion, or 38 cents a share, the company said.",
            "Troops withdrew from the border town on Friday, officials said.",
            "The minister denied the report.",
            "Loss of the receptor impairs clearance of amyloid in mice.",
            "Statins reduce the risk of stroke in patients with diabetes.",
            "The quokka is a small marsupial that lives on a few islands off the coast of Western Australia. It "
            "feeds at night on grasses and leaves.",
            "The bridge, completed in 1932, was the longest of its kind for four years. Its deck was rebuilt in "
            "the 1980s after cracks were found in the hangers.",
            "The equations of motion for a viscous gas are linearised about a uniform stream. Pressure "
            "distributions are given for wedges of small angle.",
            "There are several explanations for this.",
            "That is another matter, and I will come back to it.",
            "Dendritic cells of the lymph node present antigens that they take up from the afferent lymph. In "
            "this study we examined the role of a chemokine receptor and its ligand CCL21 in T cell priming, and "
            "found that mice without the receptor had fewer germinal centres and lower titres of IgG after "
            "immunisation.",
            "Leptin plays a pivotal role in the regulation of energy balance. Secretion of resistin by "
            "adipocytes, however, contributes to hepatic insulin resistance in the development of type 2 "
            "diabetes.",
            "Cloning and intracellular localisation of a novel human phosphodiesterase: transcripts were detected "
            "by reverse transcription-polymerase chain reaction in testis and lung.",
            "Methylation of H3K4 marks the promoters of transcribed genes.",
            "Er ist gestern nicht gekommen.",
            "La niña come una manzana.",
            "Il fait froid ce matin.",
            "Маленькая собака спит.",
            "猫が窓のそばで寝ている。",
            "他在公园里跑步。",
        )
    ),
)
"""Whether the text is a query with an instruction, and the text."""
