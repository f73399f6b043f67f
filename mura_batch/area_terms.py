"""The codes and words that ``area.py`` recognises; data only.

Codes: DICOM PS3.16 Annex L (Table L-1) and CID 4031, SNOMED CT first, then the legacy SRT code
of the same concept. Words, separated by commas: English, German, French, Spanish, Russian,
Chinese (with the Japanese words that would otherwise be misread), a line a language. They are
compared after NFKC, casefold and accent stripping, so they stand here in their ordinary spelling;
a ``*`` at the end of a word stands for any ending (Russian and German inflection).
"""

OUTSIDE = "outside the upper limb"
GIRDLE = "shoulder girdle"

AREA_CODES = {
    "XR_ELBOW": "16953009 T-15430 76248009 T-D8300",
    "XR_FINGER": "7569003 T-D8800 125682004 T-15516 76505004 T-D8810",
    "XR_FOREARM": (
        "14975008 T-D8500 55797009 T-12402 62413002 T-12420 23416004 T-12430 110535000 T-12403"
    ),
    "XR_HAND": "85562004 T-D8700 24097009 T-12600 36455000 T-12540",
    "XR_HUMERUS": "85050009 T-12410 40983000 T-D8200",
    "XR_SHOULDER": "16982005 T-D2220",
    "XR_WRIST": "74670003 T-15460 8205005 T-D8600 30518006 T-12450 75129005 T-1242B",
}

# Proximal and distal humerus: XR_HUMERUS, but they give way to a word for the neighbour.
YIELDING_CODES = {
    ("XR_HUMERUS", "XR_SHOULDER"): "119524001 T-1240F",
    ("XR_HUMERUS", "XR_ELBOW"): "118495001 T-1241F",
}

GIRDLE_CODES = "51299004 T-12310 79601000 T-12280 85856004 T-15420"

# Upper limb, extremity, bone of upper limb, muscle of upper limb.
GENERIC_CODES = "53120007 T-D8000 66019005 T-D0300 371195002 T-D0821 30608006 T-13600"

# The rest of CID 4031, the older chest, abdomen and pelvis codes, and parts of the lower limb.
OUTSIDE_CODES = (
    "818981001 818982008 70258002 T-15750 53505006 T-59900 86598002 T-280A0 28273000 T-60610 "
    "34707002 T-60600 89837001 T-74000 72001000 T-12700 76752008 T-04000 955009 T-26000 "
    "80144004 T-12770 122494005 T-11501 1217257000 816094009 416775004 R-FAB56 416550000 R-FAB55 "
    "64688005 T-11BF0 71854001 T-59300 79741001 T-64500 38848004 T-58200 38266002 T-D0010 "
    "32849002 T-56000 110861005 T-DD163 81745001 T-AA000 371398005 T-D0801 91397008 T-11196 "
    "71341001 T-12710 87342007 T-12750 56459004 T-D9700 28231008 T-63000 69536005 T-D1100 "
    "774007 T-D1000 80891009 T-32000 29836001 T-D2500 24136001 T-15710 34516001 T-58600 "
    "22356005 T-12340 361078006 T-AB959 661005 T-D1213 21306003 T-58400 72696002 T-D9200 "
    "14742008 T-59000 4596009 T-24100 303270005 T-50007 30021000 T-D9400 61685007 T-D9000 "
    "122496007 T-11503 1217253001 91609006 T-11180 59066005 T-11133 70925003 T-11170 "
    "72410000 T-D3300 102292000 T-14668 74386004 T-11149 45048000 T-D1600 417437006 R-FAB52 "
    "416319003 R-FAB54 416152001 R-FAB53 55024004 T-11102 363654007 T-D14AE 15776009 T-65000 "
    "69930009 T-65010 110621006 T-65600 2095001 T-22000 45289007 T-61100 64234005 T-12730 "
    "816092008 1231522001 706342009 R-FE0C7 41216001 T-92000 34402009 T-59600 113197003 T-11300 "
    "1217254007 39723000 T-15680 54735007 T-11AD0 89546000 T-11100 42575006 T-D1460 "
    "58742003 T-12980 30315005 T-58000 421060004 T-D04FF 7844006 T-15610 56873002 T-11210 "
    "69695003 T-57000 54019009 T-61300 27949001 T-15770 53620006 T-15290 68367000 T-D9100 "
    "122495006 T-11502 1217256009 29707007 T-D9800 44567001 T-25000 431491007 T-7000B "
    "87953007 T-73000 13648007 T-75000 110639002 T-88920 110517009 T-11011 13881006 T-11166 "
    "51185008 T-D3000 113345001 T-D4000 12921003 T-D6000 12611008 T-12740 67453005 T-12780 "
    "416804009 T-D9713 108371006 T-12761 46862004 T-D2600 39607008 T-28000 64605006 T-1274B "
    "310652005 T-D078D"
)

AREA_WORDS = {
    "XR_ELBOW": (
        "elbow, elbows, olecranon, radial head, head radius, "
        "Ellenbogen, Ellenbogens, Ellbogen, Ellenbogengelenk, Ellbogengelenk, Ellenbogengelenke, "
        "Radiuskopf, Radiusköpfchen, Radiuskoepfchen, Olekranon, "
        "coude, coudes, olécrane, olécrâne, "
        "codo, codos, olécranon, "
        "локоть, локтя, локтю, локтем, локте, локти, локтей, локтев* сустав*, "
        "肘, 肘关节, 手肘, "
    ),
    "XR_FINGER": (
        "finger, fingers, digit, digits, phalanx, phalanges, thumb, thumbs, "
        "Fingers, Fingern, Zeigefinger, Mittelfinger, Ringfinger, Kleinfinger, Daumen, Daumens, "
        "Fingergelenk, Fingergelenke, "
        "doigt, doigts, pouce, pouces, phalange, "
        "dedo mano, dedos mano, dedo manos, dedos manos, pulgar, pulgares, falange, falanges, "
        "палец кист*, пальц* кист*, "
        "手指, 指骨, 拇指, 食指, 示指, 中指, 无名指, 小指, 指间关节, 母指, "
    ),
    "XR_FOREARM": (
        "forearm, forearms, fore arm, radius, ulna, radius ulna, radiusulna, radius and ulna, "
        "antebrachium, "
        "Unterarm, Unterarms, Unterarme, Unterarmes, Vorderarm, U ARM, UARM, Radius und Ulna, "
        "avant bras, avantbras, "
        "antebrazo, antebrazos, cúbito, radio y cúbito, cúbito y radio, "
        "предплечье, предплечья, предплечью, предплечьем, предплечий, лучев* кост*, "
        "локтев* кост*, "
        "前臂, 尺桡骨, 桡骨, 尺骨, 橈骨, 尺橈骨, 前腕, "
        "underarm, underarmar, underarmen, "  # Swedish: the forearm, not the armpit
    ),
    "XR_HAND": (
        "hand, hands, metacarpal, metacarpals, metacarpus, "
        "Hände, Haende, Händen, Haenden, Mittelhand, Mittelhandknochen, "
        "métacarpe, métacarpes, métacarpien, métacarpiens, "
        "mano, manos, metacarpo, metacarpiano, metacarpianos, "
        "кисть, кисти, кистью, кистей, кистям, кистях, пястн* кост*, "  # but киста is a cyst
        "手, 手部, 手掌, 手背, 手骨, 掌骨, "
    ),
    "XR_HUMERUS": (
        "humerus, upper arm, upper arms, upperarm, "
        "Oberarm, Oberarms, Oberarme, Oberarmes, Oberarmschaft, Humerusschaft, O ARM, OARM, "
        "humérus, bras, "
        "húmero, húmeros, brazo, brazos, "
        "плечев* кост*, "
        "上臂, 肱骨, 上腕, 上腕骨, "
    ),
    "XR_SHOULDER": (
        "shoulder, shoulders, shldr, glenohumeral, gleno humeral, "
        "Schulter, Schultern, Schultergelenk, Schultergelenke, Schultergelenks, "
        "Glenohumeralgelenk, "
        "épaule, épaules, glénohumérale, gléno humérale, "
        "hombro, hombros, glenohumeral, "
        "плечев* сустав*, "
        "肩, 肩部, 肩关节, "
    ),
    "XR_WRIST": (
        "wrist, wrists, carpal, carpals, carpus, scaphoid, distal* radius, radius distal*, "
        "Handgelenk, Handgelenks, Handgelenke, Handgelenkes, Handwurzel, Handwurzelknochen, "
        "Skaphoid, "
        "poignet, poignets, carpe, scaphoïde, "
        "muñeca, muñecas, carpo, escafoides, "
        "запястье, запястья, запястью, запястьем, запястий, лучезапястн*, "
        "дистальн* отдел* лучев* кост*, дистальн* метаэпифиз* лучев* кост*, "
        "腕, 腕关节, 手腕, 手腕关节, 手腕關節, 腕骨, 腕舟骨, 手舟骨, 桡骨远端, 橈骨遠端, 手関節, "
    ),
}

YIELDING_WORDS = {
    ("XR_HUMERUS", "XR_SHOULDER"): (
        "proximal* humerus, humerus proximal*, proximal* húmero, húmero proximal*, humeral head, "
        "head humerus, Humeruskopf, 肱骨近端, проксимальн* отдел* плечев* кост*"
    ),
    ("XR_HUMERUS", "XR_ELBOW"): (
        "distal* humerus, humerus distal*, distal* húmero, húmero distal*, 肱骨远端, "
        "дистальн* отдел* плечев* кост*"
    ),
}

# Words with two readings: never an answer alone.
EITHER_WORDS = {
    ("XR_HUMERUS", "XR_SHOULDER"): ("плечо, плеча, плечу, плечом, плече, плечи, плеч, плечев*"),
    ("XR_FINGER", OUTSIDE): "dedo, dedos, палец, пальц*",
    ("XR_WRIST", OUTSIDE): "navicular, naviculare, Kahnbein, ладьевидн*, 舟骨",
    ("XR_ELBOW", "XR_FOREARM"): "локтев*, cubitus",
}

# Vendors write ARM for any part of the arm; the word suggests XR_HUMERUS and no more.
ARM_WORDS = "arm, arms, Arme, 臂, 手臂, 胳膊"

# The hand in French, and something else in English: evidence beside a French word only.
FRENCH_WORDS = {"XR_HAND": "main, mains"}
FRENCH_CONTEXT = (
    "droite, droit, droites, gauche, gauches, dte, gche, face, profil, incidence, incidences, "
    "radiographie, radiographies, cliché, clichés, deux, poignet, poignets, doigt, doigts, pouce, "
    "coude, épaule, bras, bilatérale, bilatérales, comparatif, comparative, comparatives"
)

GIRDLE_WORDS = (
    "clavicle, clavicles, collarbone, collar bone, scapula, scapulae, shoulder blade, "
    "shoulder girdle, acromion, acjoint, ac joint, ac joints, a c joint, acromioclavicular, "
    "acromio clavicular, "
    "Clavicula, Klavikula, Schlüsselbein, Schluesselbein, Schulterblatt, Schultergürtel, "
    "Schulterguertel, AC Gelenk, ACG, Schultereckgelenk, "
    "clavicule, clavicules, omoplate, omoplates, acromio claviculaire, "
    "clavícula, clavículas, escápula, escápulas, omóplato, acromioclavicular, "
    "ключиц*, лопатк*, лопаточн*, акромиальн*, ключично акромиальн*, надплечье, надплечья, "
    "锁骨, 鎖骨, 肩胛, 肩胛骨, 肩锁关节, 肩鎖關節"
)

GENERIC_WORDS = (
    "upperlimb, upper limb, upper limbs, upperextremity, upper extremity, upper extremities, "
    "upper extrem, upper ext, extremity, extremities, extremety, up exm, limb, "
    "Extremität, Extremitäten, Extremitaet, Extremitaeten, obere* Extremität, "
    "membre supérieur, membres supérieurs, extrémité, extrémités, "
    "miembro superior, extremidad, extremidades, extremidad superior, "
    "верхн* конечност*, конечност*, рука, руки, руке, руку, рукой, "
    "上肢, 四肢"
)

# Words that only look like a part; they hide the word inside them.
NEUTRAL_WORDS = (
    "c arm, hand side, outstretched hand, "
    "手术, 手術, 手动, 手法, 手机, 手工, 手写, 不足, 足够, 充足"
)

OUTSIDE_WORDS = (
    "hip, hips, hipjoint, thigh, femur, femurs, femoral, knee, knees, patella, leg, legs, "
    "lowerleg, lower leg, tibia, tibial, tibiae, fibula, tib fib, tibfib, tibiafibula, ankle, "
    "ankles, foot, feet, forefoot, hindfoot, heel, calcaneus, talus, tarsal, tarsals, tarsus, "
    "metatarsal, metatarsals, toe, toes, great toe, hallux, lower limb, lowerlimb, lower limbs, "
    "lower extremity, lower extremities, lowerextremity, lower ext, low exm, "
    "chest, thorax, lung, lungs, rib, ribs, sternum, scjoint, sc joint, sc joints, "
    "sternoclavicular, sterno clavicular, heart, breast, abdomen, abdominal, kub, pelvis, "
    "pelvic, sacrum, sacral, coccyx, sacroiliac, sijoint, si joint, si joints, "
    "spine, cspine, tspine, lspine, ctspine, tlspine, lsspine, cervical spine, thoracic spine, "
    "lumbar spine, lumbar, vertebra, vertebrae, vertebral, skull, cranium, mandible, jaw, jaws, "
    "maxilla, tmjoint, tmj, sinus, sinuses, orbit, orbits, zygoma, nasal bone, facial bones, "
    "whole body, wholebody, babygram, "
    "Hüfte, Huefte, Hüften, Hüftgelenk, Hueftgelenk, Oberschenkel, Knie, Kniegelenk, Kniescheibe, "
    "Unterschenkel, Schienbein, Wadenbein, Sprunggelenk, OSG, Fuß, Füße, Fuesse, Vorfuß, "
    "Mittelfuß, Rückfuß, Rueckfuss, Ferse, Fersenbein, Zehe, Zehen, Zeh, Großzehe, Grosszehe, "
    "untere* Extremität, untere* Extremitäten, Brustkorb, Brustbein, Lunge, Rippe, Rippen, "
    "Bauch, Becken, Kreuzbein, Steißbein, Wirbelsäule, Wirbelsaeule, HWS, BWS, LWS, Schädel, "
    "Schaedel, Unterkiefer, Oberkiefer, "
    "hanche, hanches, cuisse, fémur, genou, genoux, rotule, jambe, jambes, péroné, cheville, "
    "chevilles, pied, pieds, talon, orteil, orteils, membre inférieur, membres inférieurs, "
    "bassin, rachis, crâne, mâchoire, poumon, poumons, sternoclaviculaire, sterno claviculaire, "
    "cadera, caderas, muslo, rodilla, rodillas, rótula, pierna, piernas, tobillo, tobillos, "
    "pie, pies, talón, calcáneo, dedo pie, dedos pie, dedos pies, miembro inferior, "
    "extremidad inferior, tórax, costilla, costillas, columna, cráneo, mandíbula, "
    "тазобедрен*, бедр*, коленн*, колен*, надколенник*, голен*, голеностоп*, большеберцов*, "
    "малоберцов*, стопа, стопы, стопе, стопу, стопой, стоп, пяточн*, палец стоп*, пальц* стоп*, "
    "нижн* конечност*, грудн* клетк*, грудин*, грудино ключичн*, легких, легкие, ребер, ребра, "
    "позвоночник*, позвонк*, таз, таза, крестц*, череп, черепа, челюст*, брюшн* полост*, "
    "髋, 髖, 髋关节, 股骨, 大腿, 膝, 膝关节, 髌骨, 小腿, 胫骨, 腓骨, 胫腓骨, 脛骨, 踝, 足, 足部, "
    "足趾, 趾, 趾骨, 脚, 腳, 跟骨, 跖骨, 足舟骨, 下肢, 胸, 胸部, 胸锁关节, 胸鎖關節, 肋骨, 胸骨, "
    "腹部, 骨盆, 脊柱, 颈椎, 頸椎, 胸椎, 腰椎, 骶骨, 尾骨, 头颅, 頭顱, 颅骨, 头部, 下颌, 上颌"
)

# Common in other phrases ("radial head", "surgical neck"): count in Body Part Examined and in the
# meaning of a region code alone.
OUTSIDE_PARTS = (
    "head, neck, headneck, eye, ear, nose, face, back, brain, liver, kidney, bladder, prostate, "
    "pancreas, gallbladder, esophagus, stomach, colon, rectum, uterus, aorta, mediastinum, iac, "
    "trachea, bronchus, larynx, Kopf, Hals, tête, cou, cabeza, cuello, голова, шея, 头, 颈"
)

# Sides and small words that may stand between the words of one term ("upper left arm").
SKIPPED = (
    "l, r, li, re, lt, rt, left, right, both, bilateral, links, rechts, linke, linker, linken, "
    "linkes, rechte, rechter, rechten, rechtes, droite, droit, gauche, derecha, derecho, "
    "izquierda, izquierdo, dcha, izq, левый, левая, левое, левой, левого, правый, правая, "
    "правое, правой, правого, обеих, 左, 右, 双, 侧, of, the, de, la, del, der, des, du"
)

# Glued to a body part without a space, as in RHAND or HANDPA.
GLUED_BEFORE = "l, r, lt, rt, left, right, xr"
GLUED_AFTER = "lt, rt, left, right, ap, pa, lat, li, re"
