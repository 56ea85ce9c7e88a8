import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "DIRECTORY"  # where this file lies, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, pad_token_id=tokenizer.pad_token_id)

asked = {"role": "user", "content": "How do I plant a bean?"}
answers = ["Push it into a pot of soil.", "Ask someone else."]
chats = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
texts = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    print(model(**texts).logits[:, 0])
