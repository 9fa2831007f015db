"""Everyday texts to calibrate on, of the kinds that people search and compare: written for this project, like its code.

Python's documentation, the other source of calibration texts, has no short declarative sentences, no questions of daily
life, no encyclopedic prose and no abstracts. The gate's texts of these kinds, `EVERYDAY_PROBES`, are others.
"""

from __future__ import annotations

from collections.abc import Iterator

SUBJECTS = (
    "A woman",
    "An old man",
    "Two children",
    "The cook",
    "A brown dog",
    "Three students",
    "A boy in a blue coat",
    "The girl",
    "Some workers",
    "A cat",
    "My neighbour",
    "The tall runner",
    "A group of tourists",
    "One of the horses",
    "The nurse",
    "A baby",
    "People",
    "He",
)
ACTIONS = (
    ("is peeling a carrot", "are peeling carrots"),
    ("is asleep on the sofa", "are asleep in the shade"),
    ("is riding a bicycle through the rain", "are riding bicycles through the rain"),
    ("jumps over a low fence", "jump over a low fence"),
    ("is drawing a house with chalk", "are drawing a house with chalk"),
    ("waits at the bus stop", "wait at the bus stop"),
    ("is holding a red umbrella", "are holding red umbrellas"),
    ("looks out of the window", "look out of the window"),
    ("is washing a car", "are washing a car"),
    ("is practising the drums", "are practising the drums"),
    ("has crossed the river", "have crossed the river"),
    ("is not eating anything", "are not eating anything"),
    ("was sitting by the fire", "were sitting by the fire"),
    ("is laughing", "are laughing"),
    ("carries a box up the stairs", "carry a box up the stairs"),
    ("is mixing flour and water in a bowl", "are mixing flour and water in a bowl"),
    ("runs across a field", "run across a field"),
    ("is wearing green", "are wearing green"),
    ("is being photographed", "are being photographed"),
)
PLURALS = ("Two children", "Three students", "Some workers", "People")
QUESTIONS = (
    "how long do boiled eggs keep in the fridge",
    "What is the difference between a moth and a butterfly?",
    "why is my cheque still not paid in",
    "Who designed the first lighthouse with a rotating lens?",
    "can I change the delivery address after ordering",
    "which side of the road do they drive on in Japan",
    "How do vaccines train the immune system?",
    "cheap flights to lisbon in may",
    "best way to remove rust from garden tools",
    "When did the printing press reach Venice?",
    "is it safe to mix bleach and vinegar",
    "What time does the museum close on Sundays?",
    "my card was declined abroad, what now",
    "How many players are there in a handball team?",
    "what does a mechanical engineer earn",
    "Does reducing salt lower blood pressure in healthy adults?",
    "set an alarm for half past six tomorrow",
    "python list comprehension with two conditions",
    "boundary layer transition at high mach numbers",
    "Where can I find the serial number of my dishwasher?",
    "symptoms of iron deficiency in teenagers",
    "Why do leaves change colour in autumn?",
    "translate good night into Portuguese",
    "how to merge two branches without a merge commit",
)
MESSAGES = (
    "I still have not received the refund for last week's order.",
    "please remind me to call the dentist",
    "The app logs me out every time I open it.",
    "i feel really calm and rested after the weekend",
    "I was so angry that I could not say a word.",
    "Could you send a replacement? The lid was broken.",
    "There is a charge on my account that I do not recognise.",
    "i am a little worried about how the exam will go",
    "Turn the lights in the hallway off.",
    "Thanks, that solved it straight away!",
    "The soup was cold and the waiter forgot our drinks.",
    "A quiet, touching film that stays with you for days.",
    "Not worth the money: the handle came off after a week.",
    "Error when deploying the package to the test server",
    "Sorting a table by two columns in a spreadsheet macro",
    "How to unit test a private method",
    "It depends on which version you have.",
    "I would not worry too much about that.",
    "There may be a simpler way to do it, but this should work.",
    "You are right, that was not the question.",
)
HEADLINES = (
    "Storm leaves thousands without power along the west coast",
    "Central bank holds interest rates for a third month",
    "Shares in the airline fell 4.2 percent to $31.10 on Tuesday.",
    "Striker out for six weeks after knee surgery",
    "The two companies did not disclose the terms of the deal.",
    "Police said on Monday that nobody was hurt in the fire.",
    "Parliament votes to ban single-use cups",
    "New species of frog found in a mountain stream",
    "The court rejected the appeal by five votes to four, the spokesman said.",
    "Rover sends its first pictures from the crater's rim",
)
ABSTRACTS = (
    "Background: Macrophages of the spleen take up apoptotic cells, but the receptors that are involved are not "
    "known. We show that deletion of a scavenger receptor in myeloid cells delays clearance and raises serum "
    "levels of interleukin-6 and TNF-alpha in mice that were injected with lipopolysaccharide.",
    "We isolated a cDNA that encodes a 62-kDa tyrosine kinase by reverse transcription-PCR with degenerate "
    "primers. Northern blots showed transcripts of 2.8 and 4.1 kb in kidney, liver and brain. When it was "
    "expressed in COS-7 cells, the protein phosphorylated itself and was stimulated threefold by epidermal growth "
    "factor.",
    "Insulin resistance in obese subjects is associated with infiltration of adipose tissue by lymphocytes. Here "
    "we measured fasting glucose, adiponectin and C-reactive protein in 86 patients before and after bariatric "
    "surgery.",
    "Histone deacetylases are recruited to promoters by corepressor complexes. Using chromatin "
    "immunoprecipitation followed by sequencing, we mapped HDAC3 and RNA polymerase II in hepatocytes, and found "
    "that binding correlates with active transcription rather than with repression.",
    "Haematopoietic stem cells reside in niches of the bone marrow, where cytokines and adhesion molecules "
    "regulate their quiescence. Conditional knockout of the ligand in endothelial cells reduced their number and "
    "their ability to reconstitute irradiated recipients.",
    "The assembly of the small ribosomal subunit begins in the nucleolus. We identify an RNA helicase whose "
    "depletion leads to accumulation of 20S pre-rRNA in the cytoplasm of yeast.",
    "Injection of the peptide into the hippocampus of transgenic rats impaired spatial memory and reduced the "
    "expression of synaptophysin; both effects were prevented by an inhibitor of calpain.",
    "Randomised trials of vitamin K antagonists for atrial fibrillation were reviewed. The pooled relative risk "
    "of ischaemic stroke was 0.38 (95% CI 0.28 to 0.52), at the price of more major bleeding.",
)
PROSE = (
    "The Aral Sea was once the fourth-largest lake in the world. After the rivers that fed it were diverted for "
    "cotton, it lost nine tenths of its water, and its fishing towns now lie far from any shore.",
    "Basalt is a dark, fine-grained rock that forms where lava cools quickly. Most of the ocean floor consists of it.",
    "Johannes Gutenberg was a goldsmith before he became a printer. His movable type was cast from an alloy of "
    "lead, tin and antimony, which melts at a low temperature and hardly shrinks as it sets.",
    "The village has 412 inhabitants and lies in a valley at 830 metres. It was first mentioned in a deed of 1187.",
    "A cantilever is a beam that is supported at one end only. Balconies, aircraft wings and diving boards are "
    "examples.",
    "Rinderpest, a disease of cattle, was declared eradicated in 2011. It is the second disease, after smallpox, "
    "of which this can be said.",
    "In the trial, 214 patients were given either the drug or a placebo for twelve weeks. Mean systolic pressure "
    "fell by 7.4 mmHg in the treated group and by 1.1 mmHg in the control group (p < 0.01).",
    "An experimental study of heat transfer to a flat plate at zero incidence was made in a supersonic wind "
    "tunnel. The measured recovery factors agree with laminar theory up to a Reynolds number of two million.",
    "The band was formed in Leeds in 1994 by two sisters. Their second album sold slowly at first, but is now "
    "regarded as one of the most influential records of its decade.",
    "Mitochondrial fission is required for apoptosis in some, but not in all, cell types.",
    "Overexpression of the transporter increases resistance to the antibiotic in cultured cells.",
    "The treaty was signed on the third of March and ratified by nine states within the year; it obliged them to "
    "open their ports to each other's ships.",
    "Honeybees tell each other where food is by dancing. The angle of the dance is that between the food and the sun.",
    "The station has six platforms. Trains to the airport leave every twenty minutes, and the journey takes half "
    "an hour.",
)
OTHER_LANGUAGES = (
    "Der Zug nach München fährt heute von Gleis 7 ab und hat etwa zehn Minuten Verspätung.",
    "Pourquoi le pain rassis devient-il dur alors que les biscuits deviennent mous ?",
    "El contrato se renueva automáticamente salvo que una de las partes avise con treinta días de antelación.",
    "La temperatura dell'acqua deve restare sotto gli ottanta gradi, altrimenti il tè verde diventa amaro.",
    "Para instalar o programa, descarregue o ficheiro e siga as instruções do assistente.",
    "De gemeente plant volgend voorjaar tweehonderd bomen langs de nieuwe fietsroute.",
    "Rozkład jazdy autobusów zmienia się od pierwszego września; proszę sprawdzić godziny odjazdów.",
    "После дождя дорога стала скользкой, поэтому водителям советуют снизить скорость.",
    "Чому вода в морі солона, а в річці ні?",
    "Η βιβλιοθήκη είναι ανοιχτή κάθε μέρα εκτός Κυριακής από τις εννέα το πρωί.",
    "Toplantı saat üçte başlıyor; sunum dosyasını önceden paylaşır mısınız?",
    "يجب حفظ الدواء في مكان بارد وجاف بعيدا عن متناول الأطفال.",
    "המתכון דורש שתי כוסות קמח, ביצה אחת וחצי כפית מלח.",
    "कृपया आवेदन पत्र के साथ पहचान पत्र की प्रति संलग्न करें।",
    "この製品を使用する前に、取扱説明書をよくお読みください。",
    "这本书介绍了如何在没有图形处理器的机器上部署语言模型。",
    "겨울철에는 수도관이 얼지 않도록 미리 보온 조치를 해야 합니다.",
    "กรุณาตรวจสอบที่อยู่จัดส่งก่อนยืนยันคำสั่งซื้อ",
    "Hợp đồng bảo hiểm có hiệu lực kể từ ngày ký và được gia hạn hàng năm.",
    "Silakan hubungi layanan pelanggan jika paket belum tiba dalam lima hari kerja.",
)


def short_sentences() -> Iterator[str]:
    """Yields declarative sentences of three to twelve words: each subject with each action, in mixed order."""
    for index in range(len(SUBJECTS) * len(ACTIONS)):  # the two numbers have no common divisor
        subject, (singular, plural) = SUBJECTS[index % len(SUBJECTS)], ACTIONS[index % len(ACTIONS)]
        yield f"{subject} {plural if subject in PLURALS else singular}."
